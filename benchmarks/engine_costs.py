"""What `bench engine` times: pools whose units are sleeps, a node that is killed, the scheduler, commits.

Importing this imports no Ray: that is for the pools of actors alone.
"""

import logging
import os
import statistics
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..capture.engines.drive import run_on
from ..capture.engines.events import Done, Event, Placed, Ready, Receipt, Report, UnitDone, WorkerJoined
from ..capture.engines.patience import Limits
from ..capture.engines.processes import Processes
from ..capture.engines.work import RunUnit
from ..capture.store.layout import ArraySpec, create_store
from ..capture.store.writing.attempt import begin_attempt
from ..capture.store.writing.commit import Store
from .bare_plan import bare_plan


@dataclass(frozen=True)
class Sleep:
    """Builds what runs units that are only a sleep. Their receipts say, as tokens, how many microseconds the
    worker had waited for the unit.
    """

    seconds: float

    def __call__(self) -> RunUnit:
        ended_s = time.perf_counter()

        def run(unit: int) -> Receipt:
            nonlocal ended_s
            waited_s = time.perf_counter() - ended_s
            if self.seconds:
                time.sleep(self.seconds)
            ended_s = time.perf_counter()
            return Receipt(num_tokens=round(1e6 * waited_s))

        return run


MakePool = Callable[[Sleep], Any]


def processes(number: int) -> MakePool:
    return lambda recipe: Processes(recipe, number)


def actors(number: int) -> MakePool:
    from ..capture.engines.ray import Actors

    class Some(Actors):
        def num_places(self) -> int:
            return number

    return lambda recipe: Some(recipe, 0, 10_000)  # so many workers that each has one core of a node


def cost(make_pool: MakePool, num_units: int, depth: int = 2) -> tuple[float, float]:
    """Milliseconds per unit from the first to the last that ends, of the clock and of the driver's CPU."""
    began_s = began_cpu_s = None
    with make_pool(Sleep(0)) as pool:
        for event in _run(pool, num_units, depth):
            if isinstance(event, UnitDone) and began_s is None:
                began_s, began_cpu_s = time.perf_counter(), time.process_time()
        assert began_s is not None and began_cpu_s is not None
        seconds, cpu_s = time.perf_counter() - began_s, time.process_time() - began_cpu_s
    return 1000 * seconds / (num_units - 1), 1000 * cpu_s / (num_units - 1)


def overhead(make_pool: MakePool, num_workers: int, seconds: float) -> float:
    """Mean milliseconds that a worker waits between two units, in twenty rounds with all workers at work."""
    num_joined, waited_us = 0, []
    with make_pool(Sleep(seconds)) as pool:
        for event in _run(pool, 400 * num_workers):
            num_joined += isinstance(event, WorkerJoined)
            if isinstance(event, UnitDone) and num_joined == num_workers:
                waited_us.append(event.receipt.num_tokens)
            # the first two rounds still hold the last worker's start
            if len(waited_us) == 22 * num_workers:
                return statistics.fmean(waited_us[2 * num_workers :]) / 1000
    raise RuntimeError(f"{num_joined} of {num_workers} workers came before all units were done")


def _run(pool: Any, num_units: int, depth: int = 2) -> Iterator[Event]:
    return run_on(pool, range(num_units), committed=lambda unit: None, limits=Limits(depth=depth))


def _node(cpus: int) -> dict[str, Any]:
    return {"num_cpus": cpus, "object_store_memory": 80 << 20}


@contextmanager
def three_nodes(cpus: int) -> Iterator[Any]:
    """A Ray cluster of a head and two nodes in this machine, which this process is connected to."""
    import ray
    from ray.cluster_utils import Cluster

    with tempfile.TemporaryDirectory(prefix="looptap-", ignore_cleanup_errors=True) as directory:
        (Path(directory) / "ray").mkdir()
        before = os.environ.get("RAY_TMPDIR")
        os.environ["RAY_TMPDIR"] = directory
        cluster = Cluster(initialize_head=True, head_node_args={**_node(cpus), "include_dashboard": False})
        try:
            for _ in range(2):
                cluster.add_node(**_node(cpus))
            ray.init(cluster.address, log_to_driver=False, logging_level=logging.ERROR)
            yield cluster
        finally:
            ray.shutdown()
            cluster.shutdown()
            os.environ.pop("RAY_TMPDIR")
            if before is not None:
                os.environ["RAY_TMPDIR"] = before


def kill_a_node(nodes: Any, cpus: int, num_units: int = 14) -> tuple[float, bool]:
    """A node with a worker is killed while units of a second are done, and none takes its place.

    Returns:
        seconds until the first of its units was given to another worker; whether every unit ended once.
    """
    from ..capture.engines.ray import Actors

    given_s: dict[int, list[float]] = {}

    class Watched(Actors):
        def give(self, worker: int, unit: int) -> None:
            given_s.setdefault(unit, []).append(time.perf_counter())
            super().give(worker, unit)

    killed_s, done = None, Counter()
    with Watched(Sleep(1.0), 0) as pool:  # a worker for each node
        for event in _run(pool, num_units):
            done.update([event.unit] if isinstance(event, UnitDone) else [])
            if killed_s is None and len(done) == 4:
                killed_s = time.perf_counter()
                nodes.remove_node(next(iter(nodes.worker_nodes)), allow_graceful=False)
    assert killed_s is not None
    again_s = min(times[1] for times in given_s.values() if len(times) > 1)
    nodes.add_node(**_node(cpus))
    nodes.wait_for_nodes(timeout=60)  # until the dead one is known to be
    return again_s - killed_s, done == Counter(range(num_units))


class _Instant:
    """Workers that cost nothing and answer at once; ten are heard at a time, as they would trickle in."""

    def __init__(self, num_workers: int) -> None:
        self._num_workers = num_workers
        self._reports: list[Report] = []

    def __enter__(self) -> "_Instant":
        return self

    def __exit__(self, *_: object) -> None: ...

    def num_places(self) -> int:
        return self._num_workers

    def start(self, worker: int) -> None:
        self._reports += [Placed(worker, ""), Ready(worker)]

    def give(self, worker: int, unit: int) -> None:
        self._reports.append(Done(worker, unit, Receipt()))

    def kill(self, worker: int) -> None: ...

    def drain(self) -> None: ...

    def poll(self, timeout_s: float) -> list[Report]:
        some, self._reports = self._reports[:10], self._reports[10:]
        return some


def scheduler_cost(num_workers: int) -> float:
    """Milliseconds of the driver's CPU per unit, of the scheduler alone with so many workers."""
    num_units = 5 * num_workers
    began_s = time.process_time()
    num_done = sum(isinstance(event, UnitDone) for event in _run(_Instant(num_workers), num_units))
    assert num_done == num_units
    return 1000 * (time.process_time() - began_s) / num_units


def commits_per_s(directory: Path | None, num_units: int = 400) -> float:
    """Durable commits of units with one tiny array, eight at a time."""
    with tempfile.TemporaryDirectory(dir=directory) as parent:
        path = Path(parent) / "run.zarr"
        tiny = ArraySpec(
            dimensions=("token", "depth"), shape=(num_units, 8), unit_rows=1, dtype="float32", attributes={}
        )
        create_store(path, plan=bare_plan(num_units), coordinates={}, arrays={"residual_norm": tiny})
        store = Store.open(path)

        def commit(unit: int) -> None:
            with begin_attempt(store, unit) as attempt:
                attempt.write("residual_norm", np.zeros((1, 8), np.float32))
                attempt.commit({"num_sequences": 1, "num_tokens": 1, "seconds": 0.0, "non_finite": {}})

        began_s = time.perf_counter()
        with ThreadPoolExecutor(8) as pool:
            list(pool.map(commit, range(num_units)))
        return num_units / (time.perf_counter() - began_s)
