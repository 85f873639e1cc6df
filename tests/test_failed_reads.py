"""A read that fails says nothing about the bytes: nothing is voided for it, and it is reported."""

import errno
import os
import random

import pytest

from looptap.capture.store.care import retry
from looptap.capture.store.care.repair import repair_store
from looptap.capture.store.care.verify import verify_store
from looptap.capture.store.reading.reader import open_store
from looptap.capture.store.writing.attempt import begin_attempt
from looptap.capture.store.writing.commit import Store
from looptap.errors import NoFileError, StoreError, StoreUnreadableError
from looptap.tests.small_stores import RECEIPT, open_or_create, write_unit

NUM_UNITS = 4
ERRORS = (errno.EIO, errno.EACCES, errno.ESTALE, errno.ETIMEDOUT, errno.EMFILE)


@pytest.fixture
def store(tmp_path, monkeypatch) -> Store:
    monkeypatch.setattr(retry, "WAITS_S", (0.0, 0.0, 0.0))
    store = open_or_create(tmp_path / "run.zarr", NUM_UNITS)
    for unit in range(NUM_UNITS):
        write_unit(begin_attempt(store, unit)).commit(RECEIPT)
    store.finish()
    return store


class Faults:
    """Makes looking at and reading files of a store fail, with a chance, or for as long as it is on."""

    def __init__(self, patch: pytest.MonkeyPatch, store: Store, seed: int, chance: float):
        self._random, self._chance, self._root = random.Random(seed), chance, str(store.path)
        self.num_failed = 0
        for name in ("open", "scandir", "stat", "lstat"):
            patch.setattr(os, name, self._faulty(getattr(os, name)))
        patch.setattr(os, "pread", self._faulty(os.pread, always=True))

    def _faulty(self, really, always=False):
        def call(path, *arguments, **options):
            text = "" if isinstance(path, int) else os.fspath(path)
            is_ours = always or (
                text.startswith(self._root) and "/driver." not in text
            )  # of a lock: elsewhere
            is_writing = arguments and isinstance(arguments[0], int) and arguments[0] & os.O_CREAT
            if is_ours and not is_writing and self._random.random() < self._chance:
                self.num_failed += 1
                number = self._random.choice(ERRORS)
                raise OSError(number, os.strerror(number), None if isinstance(path, int) else path)
            return really(path, *arguments, **options)

        return call


@pytest.mark.parametrize("chance", [0.02, 0.3])
@pytest.mark.parametrize("seed", range(30))
@pytest.mark.slow
def test_no_sound_unit_is_voided(store, monkeypatch, seed, chance):
    with monkeypatch.context() as patch:
        faults = Faults(patch, store, seed, chance)
        try:
            repair = repair_store(store.path)
            assert repair.units_voided == [] and not repair.files_restored, repair
        except (StoreError, OSError) as error:
            assert not isinstance(error, NoFileError)
    assert faults.num_failed
    repair_store(store.path)
    assert verify_store(store.path).ok and store.done() == list(range(NUM_UNITS))


def test_what_is_wrong_is_voided_beside_what_cannot_be_read(store, monkeypatch):
    path = store.path / "gap_norm/c.2.0"
    path.write_bytes(path.read_bytes()[:-1] + b"?")
    really = os.open

    def refuse(path, *arguments, **options):
        if os.fspath(path).endswith(("state/c.0.0.0", "ledger/3.json", "token_id/c.0")):
            raise OSError(errno.EIO, os.strerror(errno.EIO), path)
        return really(path, *arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(os, "open", refuse)
        report, repair = verify_store(store.path), repair_store(store.path)
    assert repair.units_voided == [2] and repair.irreparable == []
    for found in (report, repair):
        assert {problem.file for problem in found.unread} == {
            "state/c.0.0.0",
            ".looptap/ledger/3.json",
            "token_id/c.0",
        }
        assert all("Input/output error" in problem.what for problem in found.unread)
    assert not report.ok and store.todo() == [2]


def test_reads_are_tried_again(store, monkeypatch):
    """Twice what fails at first is sound."""
    really, failed = os.pread, []

    def once(descriptor, num_bytes, offset):
        if len(failed) < 2:
            failed.append(offset)
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return really(descriptor, num_bytes, offset)

    monkeypatch.setattr(os, "pread", once)
    assert verify_store(store.path).ok and len(failed) == 2


def test_bytes_that_were_read_wrongly_once_are_sound(store, monkeypatch):
    really, turned = os.pread, []

    def once(descriptor, num_bytes, offset):
        content = really(descriptor, num_bytes, offset)
        if not turned:
            turned.append(offset)
            content = bytes([content[0] ^ 1]) + content[1:]
        return content

    monkeypatch.setattr(os, "pread", once)
    assert verify_store(store.path).ok and turned


def test_waiting_has_an_end(monkeypatch):
    waited = []
    monkeypatch.setattr(retry.time, "sleep", waited.append)
    monkeypatch.setattr(retry, "WAITS_S", (1.0, 2.0))
    patient = retry.Patience(most_s=7.0)

    def fail():
        raise StoreUnreadableError("no")

    for _ in range(50):
        with pytest.raises(StoreUnreadableError):
            patient.ask(fail)
    assert sum(waited) <= 7.0


def test_a_committed_file_that_is_gone_is_never_a_fill_value(store):
    (store.path / "gap_norm/c.1.0").unlink()
    (store.path / "state/c.3.0.0").unlink()
    dataset = open_store(store.path)
    for name in ("gap_norm", "state"):
        with pytest.raises(StoreError, match=r"is missing|cannot be read"):
            dataset[name].values  # noqa: B018
    (store.path / "token_id/c.0").unlink()
    with pytest.raises(StoreError, match=r"token_id/c\.0 cannot be read: it is missing"):
        open_store(store.path)["token_id"].load()
