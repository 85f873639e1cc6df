"""Stores as somebody may send them who wants to write, read or crash outside of them: every command, on each.

Nothing outside the store changes, nothing that was put inside disappears, and no command fails otherwise than
with a message.
"""

import json
import os
import re
import shutil
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numcodecs
import numpy as np
import pytest

from looptap.capture.run import run_capture
from looptap.capture.store.keys import ATTEMPTS, COMPLETE, DRIVER_LOCK, FILES, GUARD, LEDGER, PLAN, STAGING
from looptap.capture.store.ledger_entry import entry_checksum
from looptap.capture.store.places.disk import file_record
from looptap.capture.store.reading.batches import make_batches
from looptap.capture.store.reading.reader import open_store
from looptap.cli.entry import main
from looptap.errors import UserError
from looptap.tests.store_damage import Place, make_calm

SENT = "ssh-ed25519 AAAA somebody"
DEEP = "[" * 100_000

Send = Callable[[Path, Path], None]
HOSTILE: dict[str, Send] = {}


def hostile(send: Send) -> Send:
    HOSTILE[send.__name__] = send
    return send


def staged(name: str, attempt: str = "0.1", content: str = SENT) -> Send:
    def send(store: Path, root: Path) -> None:
        (store / STAGING / attempt).mkdir(exist_ok=True)
        (store / STAGING / attempt / name).write_text(content)

    return send


for label, send in {
    "put back one up": staged("aside.residual_norm%2F..%2F..%2Fevil"),
    "put back far up": staged("aside.residual_norm%2F..%2F..%2F..%2F..%2F..%2Fevil"),
    "put back absolutely": staged("aside.%2Fevil"),
    "put back into a folder": staged("aside.residual_norm%2F..%2F..%2Fhome%2F.ssh%2Fauthorized_keys"),
    "put back plain dots": staged("aside..."),
    "put back over the root": staged("aside.zarr.json"),
    "put back over a coordinate": staged("aside.token_id%2Fc.0"),
    "put back for a unit that is not there": staged("aside.state%2Fc.0.0.0", "99.1"),
    "put back for an attempt that is not known": staged("aside.state%2Fc.0.0.0", "0.7"),
    "a strange attempt": staged("aside.state%2Fc.0.0.0", "..1"),
    "an attempt with a newline": staged("x", "0.1\nall is well"),
}.items():
    HOSTILE[label] = send


@hostile
def staging_leads_out(store: Path, root: Path) -> None:
    shutil.rmtree(store / STAGING)
    (store / STAGING).symlink_to(root / "home")


@hostile
def an_attempt_leads_out(store: Path, root: Path) -> None:
    (store / STAGING / "0.1").symlink_to(root / "home")


@hostile
def a_staged_file_leads_out(store: Path, root: Path) -> None:
    (store / STAGING / "0.1").mkdir()
    (store / STAGING / "0.1" / "aside.state%2Fc.0.0.0").symlink_to(root / "precious.txt")


@hostile
def the_ledger_leads_out(store: Path, root: Path) -> None:
    shutil.rmtree(store / LEDGER)
    (store / LEDGER).symlink_to(root / "home")


@hostile
def the_attempts_lead_out(store: Path, root: Path) -> None:
    shutil.rmtree(store / ATTEMPTS)
    (store / ATTEMPTS).symlink_to(root / "home")


@hostile
def an_array_leads_out(store: Path, root: Path) -> None:
    shutil.move(store / "gap_norm", root / "gap_norm")
    (store / "gap_norm").symlink_to(root / "gap_norm")


@hostile
def the_guard_leads_out(store: Path, root: Path) -> None:
    (store / GUARD).unlink()
    (store / GUARD).symlink_to(root / "home" / "new")


@hostile
def the_lock_leads_out(store: Path, root: Path) -> None:
    (store / DRIVER_LOCK).symlink_to(root / "precious.txt")


@hostile
def files_lead_out(store: Path, root: Path) -> None:
    for key in (
        COMPLETE,
        PLAN,
        FILES,
        "token_id/c.0",
        "state/c.0.0.0",
        f"{LEDGER}/0.json",
        "state/zarr.json",
    ):
        (store / key).unlink()
        (store / key).symlink_to(root / "precious.txt")


@hostile
def files_lead_nowhere(store: Path, root: Path) -> None:
    for key in (COMPLETE, PLAN, FILES, "sequence_id/c.0"):
        (store / key).unlink()
        (store / key).symlink_to(root / "home" / "new")


@hostile
def pipes_instead_of_files(store: Path, root: Path) -> None:
    for key in (f"{LEDGER}/1.json", f"{ATTEMPTS}/1.1", "stage/c.0", "residual_norm/c.0.0", PLAN):
        (store / key).unlink()
        os.mkfifo(store / key)


@hostile
def a_pipe_for_a_lock(store: Path, root: Path) -> None:
    os.mkfifo(store / DRIVER_LOCK)


def group(change: Callable[[dict], None], noted: bool = True) -> Send:
    """The root changed, and its checksum noted as if it had been written so."""

    def send(store: Path, root: Path) -> None:
        document = json.loads((store / "zarr.json").read_bytes())
        change(document)
        content = json.dumps(document).encode()
        (store / "zarr.json").write_bytes(content)
        if noted:
            files = json.loads((store / FILES).read_bytes())
            files["zarr.json"] = file_record(content)
            (store / FILES).write_text(json.dumps(files))

    return send


def arrays(document: dict) -> dict:
    return document["consolidated_metadata"]["metadata"]


def rename(new: str) -> Callable[[dict], None]:
    def change(document: dict) -> None:
        arrays(document)[new] = arrays(document).pop("gap_norm")

    return change


def set_in(*path_and_value: object) -> Callable[[dict], None]:
    *path, last, value = path_and_value

    def change(document: dict) -> None:
        for step in path:
            document = document[step]
        document[last] = value

    return change


ARRAY = ("consolidated_metadata", "metadata", "gap_norm")
for label, change in {
    "an array one up": rename("../secret"),
    "an array far up": rename("../../../../../../etc"),
    "an absolute array": rename("/tmp"),
    "an array of dots": rename(".."),
    "an array without a name": rename(""),
    "an array in .looptap": rename(".looptap"),
    "an array with a line": rename("a\nb"),
    "a long array": rename("a" * 5000),
    "a folder as a coordinate": set_in("attributes", "coordinates", "token_id ../home unit_done"),
    "no unit_done": set_in("attributes", "coordinates", "token_id"),
    "no coordinates": set_in("attributes", "coordinates", 7),
    "no metadata": set_in("consolidated_metadata", {}),
    "metadata that is a list": set_in("consolidated_metadata", "metadata", []),
    "a plan that is a list": set_in("attributes", "plan", []),
    "units without end": set_in("attributes", "plan", "num_units", 10**15),
    "no units": set_in("attributes", "plan", "num_units", 0),
    "less than no units": set_in("attributes", "plan", "num_units", -3),
    "a format of text": set_in("attributes", "looptap_format", "2; rm"),
    "a format to come": set_in("attributes", "looptap_format", 10**9),
    "an array without end": set_in(*ARRAY, "shape", [2**47, 8]),
    "a shape below nothing": set_in(*ARRAY, "shape", [-1, 8]),
    "no chunk": set_in(*ARRAY, "chunk_grid", "configuration", "chunk_shape", [0, 8]),
    "a chunk of all memory": set_in(*ARRAY, "chunk_grid", "configuration", "chunk_shape", [2**44, 8]),
    "objects": set_in(*ARRAY, "data_type", "object"),
    "an unknown codec": set_in(*ARRAY, "codecs", [{"name": "pickle", "configuration": {}}]),
    "no codecs": set_in(*ARRAY, "codecs", []),
    "folders of chunks": set_in(*ARRAY, "chunk_key_encoding", "configuration", "separator", "/"),
    "a strange fill": set_in(*ARRAY, "fill_value", "../../x"),
    "a transformer": set_in(*ARRAY, "storage_transformers", [{"name": "x", "configuration": {}}]),
    "axes that are one": set_in(*ARRAY, "dimension_names", ["token", "token"]),
    "an axis too many": set_in(*ARRAY, "dimension_names", ["token", "depth", "head"]),
}.items():
    HOSTILE[label] = group(change)


@hostile
def a_deep_root(store: Path, root: Path) -> None:
    (store / "zarr.json").write_text(DEEP)


@hostile
def deep_files_everywhere(store: Path, root: Path) -> None:
    for key in (PLAN, FILES, COMPLETE, f"{LEDGER}/0.json", f"{ATTEMPTS}/0.1", "state/zarr.json"):
        (store / key).write_text(DEEP)


@hostile
def checksums_of_files_elsewhere(store: Path, root: Path) -> None:
    files = json.loads((store / FILES).read_bytes())
    record = file_record((root / "precious.txt").read_bytes())
    files |= {"../precious.txt": record, "/etc/hostname": record, "token_id/../../new": record, "": record}
    (store / FILES).write_text(json.dumps(files))


@hostile
def checksums_that_are_none(store: Path, root: Path) -> None:
    files = {key: [key] for key in json.loads((store / FILES).read_bytes())}
    (store / FILES).write_text(json.dumps(files))


def entry(change: Callable[[dict], None]) -> Send:
    def send(store: Path, root: Path) -> None:
        path = store / LEDGER / "0.json"
        document = json.loads(path.read_bytes())
        change(document)
        document["checksum"] = entry_checksum(document)
        path.write_text(json.dumps(document))

    return send


for label, change in {
    "an entry of files elsewhere": set_in("shards", "gap_norm", 0, "file", "../precious.txt"),
    "an entry of an absolute file": set_in("shards", "gap_norm", 0, "file", "/etc/hostname"),
    "an entry of another array": set_in("shards", "../x", []),
    "an entry of endless pieces": set_in("shards", "gap_norm", 0, "pieces", [[0, 2**60, "00000000"]]),
    "an entry of pieces before": set_in("shards", "gap_norm", 0, "pieces", [[-9, 9, "00000000"]]),
    "an entry of no size": set_in("shards", "gap_norm", 0, "bytes", "many"),
    "an entry without sense": set_in("num_tokens", {"$": DEEP[:50]}),
    "an entry of no time": set_in("seconds", float("nan")),
}.items():
    HOSTILE[label] = entry(change)


@hostile
def a_chunk_that_grows(store: Path, root: Path) -> None:
    """Some KiB that become a gibibyte."""
    grown = numcodecs.Zstd(level=1).encode(np.zeros(2**30, np.uint8))
    for key in ("token_id/c.0", "unit_done/c.0"):
        (store / key).write_bytes(grown)
    files = json.loads((store / FILES).read_bytes())
    files["token_id/c.0"] = file_record(bytes(grown))
    (store / FILES).write_text(json.dumps(files))


@hostile
def strange_locks(store: Path, root: Path) -> None:
    mine = {"host": 7, "pid": "../1", "process_start": [], "machine": None}
    (store / DRIVER_LOCK).write_text(json.dumps(mine))


@hostile
def a_lock_of_a_process_without_end(store: Path, root: Path) -> None:
    mine = {"host": "h", "pid": 10**40, "process_start": 1, "machine": "x"}
    (store / DRIVER_LOCK).write_text(json.dumps(mine))
    os.utime(store / DRIVER_LOCK, (1, 1))


@hostile
def strange_names(store: Path, root: Path) -> None:
    names = [
        b"\xff\xfe",
        b"\x1b[2Jall is well",
        b"a\nb",
        "٣.json".encode(),
        b"-rf",
        b"~",
        b"%2F..",
        b"c.0.0.0.0",
    ]
    for folder in ("", ".looptap", LEDGER, ATTEMPTS, "state", "token_id"):
        for name in names:
            (store / folder / os.fsdecode(name)).write_text("a stranger")


@pytest.fixture(scope="module")
def calm(tmp_path_factory):
    return make_calm(tmp_path_factory.mktemp("calm"))


def names_in(store: Path) -> set[str]:
    return {str(path.relative_to(store)) for path in store.rglob("*")}


def run(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    monkeypatch.setattr(sys, "argv", ["looptap", *map(str, arguments)])
    with pytest.raises(SystemExit) as ended:
        main()
    return int(ended.value.code or 0)


def commands(store: Path, out: Path) -> list[tuple[object, ...]]:
    return [("status", store), ("info", store), ("verify", store), ("verify", "--repair", store)]


def pages(store: Path, out: Path) -> list[tuple[object, ...]]:
    return [("analyze", store, "--out", out / "tables"), ("report", store, "--out", out / "report.html")]


def test_there_are_enough():
    assert len(HOSTILE) >= 60


@pytest.mark.slow
@pytest.mark.parametrize("label", HOSTILE)
def test_no_command_leaves_the_store(calm, tmp_path, monkeypatch, capsys, label):
    plan, path = calm
    place = Place.copy(path, tmp_path / "outside")
    (place.root / "home" / ".ssh").mkdir(parents=True)
    HOSTILE[label](place.store, place.root)
    before, inside = place.outside(), names_in(place.store)
    there = {str(path) for path in place.root.rglob("*") if place.store not in path.parents}
    for arguments in commands(place.store, tmp_path):
        assert run(monkeypatch, *arguments) in (0, 1, 2), (arguments, capsys.readouterr())
        said = capsys.readouterr()
        assert not re.search("Traceback|\x1b\\[2J", said.out + said.err), said
    for use in (
        lambda: open_store(place.store).load(),
        lambda: next(iter(make_batches(place.store))),
        lambda: run_capture(replace(plan, settings=plan.settings.but(store=place.store))),
    ):
        try:
            use()
        except UserError as error:
            assert str(place.store) in str(error) or "store" in str(error), error
    assert place.outside() == before
    assert {str(path) for path in place.root.rglob("*") if place.store not in path.parents} == there
    gone = inside - names_in(place.store)
    # what a killed attempt staged, the lock, and units that are no longer sound may go
    own = names_in(path) | {DRIVER_LOCK, f"{STAGING}/0.1"}
    assert all(name in own or name.startswith(f"{STAGING}/0.1/aside.") for name in gone), gone


# those that open, and each way to be refused
PAGES = ("files_lead_out", "pipes_instead_of_files", "strange_names", "an array far up", "an_array_leads_out",
         "a_chunk_that_grows", "an entry of files elsewhere")  # fmt: skip


@pytest.mark.full
@pytest.mark.parametrize("label", PAGES)
def test_no_page_leaves_the_store(calm, tmp_path, monkeypatch, capsys, label):
    _, path = calm
    place = Place.copy(path, tmp_path / "outside")
    (place.root / "home" / ".ssh").mkdir(parents=True)
    HOSTILE[label](place.store, place.root)
    before, inside = place.outside(), names_in(place.store)
    for arguments in pages(place.store, tmp_path):
        assert run(monkeypatch, *arguments) in (0, 1, 2), (arguments, capsys.readouterr())
    assert place.outside() == before and names_in(place.store) == inside
