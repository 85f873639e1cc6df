"""Stores of a few rows a unit, and two attempts that take turns, for the tests of the commit protocol."""

import random
import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np

from looptap.benchmarks.bare_plan import bare_plan
from looptap.capture.store.group import store_exists
from looptap.capture.store.layout import ArraySpec, create_store
from looptap.capture.store.writing.attempt import Attempt, begin_attempt
from looptap.capture.store.writing.commit import Store
from looptap.errors import UnitTakenError

ROWS, DEPTHS = 64, 3
RECEIPT = {"num_sequences": 1, "num_tokens": ROWS, "seconds": 0.0, "non_finite": {}}


def open_or_create(path: str | Path, num_units: int, **fields: object) -> Store:
    plan = bare_plan(num_units, ROWS, **fields)
    coordinates = {"token_id": (("token",), np.arange(num_units * ROWS, dtype=np.int32), {})}
    shape = (num_units * ROWS, DEPTHS)
    arrays = {
        "residual_norm": ArraySpec(("token", "depth"), shape, ROWS, "float32", {}),
        "gap_norm": ArraySpec(("token", "depth"), shape, ROWS, "float32", {}),
        # two files a unit
        "state": ArraySpec(
            ("token", "depth", "hidden"), (*shape, 8), ROWS, "float32", {}, "none", shard_rows=ROWS // 2
        ),
    }
    if not store_exists(path):
        create_store(path, plan=plan, coordinates=coordinates, arrays=arrays)
    return Store.open(path)


def unit_values(store: Store, unit: int, salt: int = 0) -> dict[str, np.ndarray]:
    """Random values, ragged. Another salt gives another content, of the same unit."""
    generator = np.random.default_rng([unit, salt])
    rows = ROWS - unit % 7
    return {
        name: generator.standard_normal((rows, *array["shape"][1:])).astype(np.float32)
        for name, array in store.arrays.items()
    }


def write_unit(attempt: Attempt, salt: int = 0) -> Attempt:
    for name, values in unit_values(attempt.store, attempt.unit, salt).items():
        attempt.write(name, values)
    return attempt


def leave_files(store: Store, unit: int) -> None:
    """Leaves files like an attempt that is killed before its ledger entry: all of them have their names."""
    attempt = write_unit(begin_attempt(store, unit), salt=9)
    for name in store.arrays:
        for key in store.shard_keys(name, unit):
            attempt.draft.publish(key, lambda: None)


def content(store: Store) -> dict[str, np.ndarray]:
    group = store.group()
    return {name: np.asarray(group[name][...]) for name in store.arrays}


class Killed(BaseException):
    """Ends an attempt as a kill does: nothing catches it, nothing is cleaned up."""


class Turns:
    """Two attempts in two threads, one running at a time; at every `gate` chance says who goes on or dies."""

    def __init__(self, seed: int, kill: bool, num_gates: int = 30):
        self.random = random.Random(seed)
        self.alive, self.changed = ["a", "b"], threading.Condition()
        self.changes = self.random.choice([0.05, 0.3, 1])  # seldom: one gets far while the other is paused
        self.turn, victim = self.random.choice("ab"), self.random.choice("ab")
        self.gates_left = {
            name: self.random.randrange(num_gates) if kill and name == victim else 999 for name in "ab"
        }

    def gated(self, function: Callable) -> Callable:
        def call(*arguments, **options):
            self.gate()
            return function(*arguments, **options)

        return call

    def gate(self) -> None:
        me = threading.current_thread().name
        if me not in self.gates_left:
            return
        self._next()
        self._await(me)
        self.gates_left[me] -= 1
        if self.gates_left[me] < 0:
            raise Killed

    def run(self, attempt: Callable[[], None]) -> None:
        """Both threads through `attempt`, to their ends."""
        threads = [threading.Thread(target=self._run, args=[attempt], name=name) for name in "ab"]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    def _run(self, attempt: Callable[[], None]) -> None:
        me = threading.current_thread().name
        self._await(me)
        try:
            attempt()
        except (UnitTakenError, Killed):
            pass
        finally:
            self.alive.remove(me)
            self._next()

    def _next(self) -> None:
        with self.changed:
            if self.turn not in self.alive or self.random.random() < self.changes:
                self.turn = self.random.choice(self.alive) if self.alive else ""
            self.changed.notify_all()

    def _await(self, me: str) -> None:
        with self.changed:
            assert self.changed.wait_for(lambda: self.turn == me, timeout=60)
