"""Damages stores at random and demands that it is noticed, mended, and does no harm to anything else.

    python -m looptap.tests.store_damage CASES [FIRST] [s3]

tries so many cases in a temporary directory, or in a bucket, beginning with number FIRST, and prints what
came of them.
"""

import os
import random
import shutil
import sys
import tempfile
from collections import Counter
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import obstore
import xarray as xr

from looptap.capture.plan import Plan, make_plan
from looptap.capture.run import run_capture
from looptap.capture.settings import CaptureSettings
from looptap.capture.store.care.repair import repair_store
from looptap.capture.store.care.status import store_status
from looptap.capture.store.care.verify import verify_store
from looptap.capture.store.places.objects import ObjectPlace
from looptap.capture.store.reading.reader import open_store
from looptap.errors import StoreError
from looptap.tests.s3_server import BUCKET, environment, serve_s3

MODEL = "random:(1,2x3,1)I,norm=pre,width=32,heads=2,seed=5"
LENGTHS = (40, 33, 25, 60, 12, 50, 44, 31, 20, 64, 18, 37)


def make_calm(folder: Path, num_units: int | None = None) -> tuple[Plan, Path]:
    """Captures a store of some units, in peace; or of the first few alone.

    Returns:
        its plan, and the store.
    """
    data = folder / "data.txt"
    data.write_text("".join("abcdefgh"[i % 8] * length + "\n" for i, length in enumerate(LENGTHS)))
    path = folder / "calm.zarr"
    settings = CaptureSettings.of(
        model=MODEL, data=data, store=path, unit_tokens=96, quantities=("all",), states=("core[all]@last",)
    )
    plan = make_plan(settings)
    left = iter(range(num_units or 10**9))
    run_capture(plan, goes_on=lambda: next(left, None) is not None)
    return plan, path


def flip(path: Path, chance: random.Random) -> None:
    content = bytearray(path.read_bytes())
    if content:
        content[chance.randrange(len(content))] ^= 1 << chance.randrange(8)
    path.write_bytes(content)


def cut(path: Path, chance: random.Random) -> None:
    os.truncate(path, chance.randrange(path.stat().st_size + 1))


def lengthen(path: Path, chance: random.Random) -> None:
    with path.open("ab") as file:
        file.write(chance.randbytes(chance.randrange(1, 40)))


def scramble(path: Path, chance: random.Random) -> None:
    size = path.stat().st_size
    path.write_bytes(chance.choice([b"", b"{}", b"[]", b"null", bytes(size), chance.randbytes(size)]))


def remove(path: Path, chance: random.Random) -> None:
    path.unlink()


def swap(path: Path, chance: random.Random) -> None:
    """Another file of the same folder in its place."""
    others = [other for other in path.parent.iterdir() if other.is_file() and other != path]
    if others:
        shutil.copy(chance.choice(sorted(others)), path)


def swap_afar(path: Path, chance: random.Random) -> None:
    """A file of another folder in its place, of the same name if there is one."""
    store = next(parent for parent in path.parents if parent.name.endswith(".zarr"))
    others = sorted(other for other in store.rglob("*") if other.is_file() and other.parent != path.parent)
    alike = [other for other in others if other.name == path.name]
    shutil.copy(chance.choice(alike or others), path)


def make_folder(path: Path, chance: random.Random) -> None:
    path.unlink()
    path.mkdir()


def link_elsewhere(path: Path, chance: random.Random) -> None:
    """A link to the very bytes, which are outside the store."""
    outside = path.parents[len(path.parts) - 1 - path.parts.index("outside")] / path.name
    shutil.copy(path, outside)
    path.unlink()
    path.symlink_to(outside)


def make_pipe(path: Path, chance: random.Random) -> None:
    path.unlink()
    os.mkfifo(path)


DAMAGES = (flip, flip, flip, cut, lengthen, scramble, remove, remove, swap, swap_afar, swap_afar)
INTRUDERS = (make_folder, make_pipe, link_elsewhere)
"""What is no file has a file's name: verify names it, and it stays until somebody moves it away."""

STRANGERS = (
    "notes.txt", "token_id/c.0.0", "residual_norm/.nfs001", "residual_norm/c.99.0",
    ".looptap/ledger/007.json", ".looptap/ledger/99.json", ".looptap/ledger/x.json",
    ".looptap/attempts/0.0", ".looptap/attempts/a.b",
    ".looptap/staging/note", ".looptap/staging/99.1/aside.x", "nothing/zarr.json", "state/c.-1.0.0",
    ".looptap/ledger/٣.json", "state/c.0.0.0.bak", ".looptap/plan.json~", "residual_norm/\udcff",
)  # fmt: skip


@dataclass
class Place:
    """What a case is tried on: a copy of the calm store, with something else beside it."""

    root: Path
    store: Path
    strangers: list[Path]

    @classmethod
    def copy(cls, calm: Path, root: Path) -> "Place":
        root.mkdir()
        (root / "precious.txt").write_text("precious")
        store = root / "run.zarr"
        shutil.copytree(calm, store)
        return cls(root, store, [])

    @property
    def address(self) -> str | Path:
        return self.store

    def outside(self) -> dict[str, bytes]:
        return {
            str(path): path.read_bytes()
            for path in self.root.rglob("*")
            if self.store not in path.parents and path.is_file()
        }

    def gone(self) -> list[str]:
        """Strangers that are not there any more."""
        return [str(path) for path in self.strangers if not path.exists()]


@dataclass
class BucketPlace(Place):
    """The same in a bucket: a copy on disk is damaged, and its files are put under a prefix of their own."""

    url: str = ""

    @property
    def address(self) -> str:
        return self.url

    def put(self) -> None:
        client = ObjectPlace(self.url).client
        self.strangers = [path for path in self.strangers if self._key(path).isprintable()]
        for path in self.store.rglob("*"):
            if path.is_file() and self._key(path).isprintable():
                obstore.put(client, self._key(path), path.read_bytes())
        obstore.put(ObjectPlace(self.url + "-beside").client, "precious.txt", b"precious")

    def outside(self) -> dict[str, bytes]:
        beside = ObjectPlace(self.url + "-beside")
        return super().outside() | {key: beside.read(key) for key in self._keys(beside)}

    def gone(self) -> list[str]:
        there = set(self._keys(ObjectPlace(self.url)))
        return [key for path in self.strangers if (key := self._key(path)) not in there]

    def _key(self, path: Path) -> str:
        return str(path.relative_to(self.store))

    @staticmethod
    def _keys(place: ObjectPlace) -> list[str]:
        return [meta["path"] for meta in obstore.list(place.client).collect()]


def damage(place: Place, chance: random.Random) -> str:
    """Damages one to three files and adds up to two strangers; returns what was done."""
    done = []
    for _ in range(chance.randrange(1, 4)):
        files = sorted(path for path in place.store.rglob("*") if path.is_file() and not path.is_symlink())
        # every kind of file as likely as another
        kinds = sorted({_kind(place.store, path) for path in files})
        kind = chance.choice(kinds)
        path = chance.choice([path for path in files if _kind(place.store, path) == kind])
        how = chance.choice(DAMAGES)
        how(path, chance)
        done.append(f"{how.__name__} {path.relative_to(place.store)}")
    for _ in range(chance.randrange(3)):
        path = place.store / chance.choice(STRANGERS)
        if not path.exists():
            path.parent.mkdir(exist_ok=True)
            path.write_text("a stranger")
            place.strangers.append(path)
            done.append(f"added {path.relative_to(place.store)!a}")
    return ", ".join(done)


def _kind(store: Path, path: Path) -> str:
    folder, _, name = str(path.relative_to(store)).rpartition("/")
    if folder in (".looptap/ledger", ".looptap/attempts"):
        return folder
    return f"{folder}/{'c' if name.startswith('c.') else name}"


def check(calm: xr.Dataset, plan: Plan, place: Place) -> Counter[str]:
    """What must hold of a damaged store; returns what came of it."""
    outside = place.outside()
    seen: Counter[str] = Counter()
    try:
        is_named = not verify_store(place.address).ok
    except StoreError:
        is_named = True
    seen["named by verify"] += is_named
    found = None
    try:
        store_status(place.address)
        found = open_store(place.address).load()
    except StoreError:
        seen["reading raises"] += 1
    if found is not None and not same(calm, found):
        assert is_named, "a reader returns other numbers, and verify does not say so"
    elif found is not None and not is_named:
        seen["harmless"] += 1
    hopeless = None
    try:
        repair_store(place.address)
    except StoreError as error:
        hopeless = str(error)
        assert "backup" in hopeless or "both damaged" in hopeless or "cannot be made whole" in hopeless, error
    if hopeless is None:
        outcome = run_capture(plan)
        assert outcome.complete, outcome
        report = verify_store(place.address)
        assert report.ok and not report.units_missing and not report.uncommitted, report
        assert same(calm, open_store(place.address).load()), "mended, and not what it was"
        seen["mended"] += 1
    else:
        seen["too little is left"] += 1
    assert place.outside() == outside, "something outside the store changed"
    assert not place.gone(), f"{place.gone()} disappeared"
    return seen


def same(calm: xr.Dataset, found: xr.Dataset) -> bool:
    """Whether every number of committed units is the calm store's, and every other is missing."""
    if set(map(str, calm.variables)) - set(map(str, found.variables)):
        return False
    done = found["unit_done"].values.astype(bool)
    for name in calm.variables:
        want, got = calm[name].values, found[name].values
        if name == "unit_done":
            continue
        if want.shape != got.shape:
            return False
        if len(want) and len(want) % len(done) == 0 and name in calm.data_vars:
            rows = np.repeat(done, len(want) // len(done))
            want, got = want[rows], got[rows]
        elif not done.all() and name in ("sequence_length", "token_sequence"):
            continue  # masked
        if not np.array_equal(want, got, equal_nan=want.dtype.kind == "f"):
            return False
    return True


def run_case(
    calm: Path, dataset: xr.Dataset, plan: Plan, folder: Path, number: int, url: str | None = None
) -> Counter[str]:
    """Tries one case.

    Args:
        url: prefix of objects, where it is to be tried in a bucket.
    """
    chance = random.Random(number)
    place = Place.copy(calm, folder / f"{number}")
    what = damage(place, chance)
    if url is not None:
        place = BucketPlace(place.root, place.store, place.strangers, f"{url}/{number}")
        place.put()
    run = replace(plan, settings=plan.settings.but(store=place.address))
    try:
        return check(dataset, run, place)
    except BaseException as error:
        error.add_note(f"case {number}: {what}")
        raise
    finally:
        shutil.rmtree(place.root)


def main(num_cases: int, first: int = 0, where: str = "disk") -> None:
    total: Counter[str] = Counter()
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        url = None
        if where == "s3":
            os.environ |= environment(stack.enter_context(serve_s3()))
            url = f"s3://{BUCKET}/damage"
        plan, calm = make_calm(Path(folder))
        dataset = open_store(calm).load()
        for number in range(first, first + num_cases):
            total += run_case(calm, dataset, plan, Path(folder), number, url)
    print(f"{num_cases} cases: " + ", ".join(f"{count} {what}" for what, count in total.most_common()))


if __name__ == "__main__":
    numbers = [int(text) for text in sys.argv[1:] if text.isdecimal()]
    main(*numbers, where="s3" if "s3" in sys.argv else "disk")
