"""From a capture's settings to the workers that it runs on."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ...errors import EngineError
from .drive import Pool, run_on
from .events import Event
from .local import ThisProcess
from .scheduler import Limits
from .work import Receipt, RunUnit, make_recipe, run_unit

if TYPE_CHECKING:
    from ..plan import Plan
    from ..store.writing.commit import Store


@dataclass(frozen=True)
class _Here:
    """The recipe of this process, which has the model found already."""

    plan: "Plan"
    store: "Store"

    def make(self) -> RunUnit:
        from ..worker import Worker

        worker = Worker(self.plan.source, self.store, self.plan.initial_states)
        return lambda unit: run_unit(worker, self.store, unit)


@contextmanager
def open_engine(plan: "Plan") -> Iterator["Engine"]:
    """What the settings ask for, connected to the cluster if there is one; refused before a store is made.

    Raises:
        EngineError, ClusterError: it cannot be had.
    """
    settings = plan.settings
    if ":" in plan.device and (settings.engine == "ray" or settings.workers is not None):
        raise EngineError(f"--device {plan.device}: workers take a GPU each; give --device cuda")
    if settings.engine == "ray":
        from .ray import cluster, num_gpus

        with cluster(settings.ray_address):
            if settings.device == "auto" and plan.device == "cpu" and (gpus := num_gpus()):
                raise EngineError(
                    f"the cluster has {gpus:.0f} GPUs and this machine none, so --device auto is in doubt: "
                    "give --device cuda, or --device cpu to leave them idle"
                )
            yield Engine(plan)
    else:
        if settings.workers is not None and plan.device == "cuda":
            _gpus(settings.workers)
        yield Engine(plan)


class Engine:
    """Works through units with the workers that the plan's settings ask for."""

    def __init__(self, plan: "Plan"):
        self._plan = plan

    def run(self, store: "Store", units: list[int], goes_on: Callable[[], bool]) -> Iterator[Event]:
        """As `run_on`; raises NoWorkersError, and StoreFullError when no unit can be committed any more."""
        settings = self._plan.settings
        pool, depth = self._pool(store)
        limits = Limits(depth=depth, no_worker_s=settings.worker_wait_s, unit_limit_s=settings.unit_limit_s)

        def committed(unit: int) -> Receipt | None:
            return None if (entry := store.entry(unit)) is None else Receipt.of(entry)

        with pool:
            yield from run_on(
                pool, units, committed=committed, goes_on=goes_on, limits=limits, wanted=settings.workers
            )

    def _pool(self, store: "Store") -> tuple[Pool, int]:
        """And how many units a worker holds."""
        plan, workers = self._plan, self._plan.settings.workers
        if plan.settings.engine == "ray":
            from .ray import Actors

            return Actors(make_recipe(plan, store), int(plan.device == "cuda"), workers), 2
        if workers is None:
            return ThisProcess(_Here(plan, store)), 1
        from .processes import Processes

        gpus = _gpus(workers) if plan.device == "cuda" else None
        return Processes(make_recipe(plan, store), workers, gpus), 2


def _gpus(num_workers: int) -> list[str]:
    """One for each worker, as CUDA_VISIBLE_DEVICES names them."""
    import torch

    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    gpus = visible.split(",") if visible else [str(i) for i in range(torch.cuda.device_count())]
    if num_workers > len(gpus):
        raise EngineError(f"--workers {num_workers}: torch sees {len(gpus)} GPUs, and each worker takes one")
    return gpus[:num_workers]
