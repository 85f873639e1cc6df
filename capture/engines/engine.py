"""Makes the workers that a capture's settings ask for, and runs units on them."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

from ...errors import EngineError
from ..plan import Plan
from ..store.writing.commit import Store
from .drive import Pool, run_on
from .events import Event
from .local import ThisProcess
from .patience import Limits
from .processes import Processes
from .work import committed, make_recipe, make_runner


@contextmanager
def open_engine(plan: Plan) -> Iterator[None]:
    """Makes sure of the workers that a plan's settings ask for, before a store is made: the cluster is
    connected if there is one, and GPUs are enough.

    Raises:
        EngineError, ClusterError: it cannot be had.
    """
    run = plan.settings.run
    if ":" in plan.device and (run.engine == "ray" or run.workers is not None):
        raise EngineError(f"--device {plan.device}: workers take a GPU each; give --device cuda")
    if run.engine == "ray":
        from .ray import cluster, num_gpus

        with cluster(run.ray_address):
            if plan.settings.model.device == "auto" and plan.device == "cpu" and (gpus := num_gpus()):
                raise EngineError(
                    f"the cluster has {gpus:.0f} GPUs and this machine none, so --device auto is in doubt: "
                    "give --device cuda, or --device cpu to leave them idle"
                )
            yield
    else:
        if run.workers is not None and plan.device == "cuda":
            _gpus(run.workers)
        yield


def run_units(plan: Plan, store: Store, units: list[int], goes_on: Callable[[], bool]) -> Iterator[Event]:
    """Works through units of a plan's store inside `open_engine`, as `run_on` does.

    Raises:
        NoWorkersError: no worker is left and none can come.
        StoreFullError, StoreRefusedError, StoreUnreachableError: no unit can be committed any more.
    """
    run = plan.settings.run
    pool, depth = _make_pool(plan, store)
    limits = Limits(depth=depth, no_worker_s=run.worker_wait_s, unit_limit_s=run.unit_limit_s)
    with pool:
        yield from run_on(
            pool,
            units,
            committed=partial(committed, store),
            goes_on=goes_on,
            limits=limits,
            wanted=run.workers,
        )


def _make_pool(plan: Plan, store: Store) -> tuple[Pool, int]:
    """The workers that the settings ask for, and how many units each of them holds."""
    run = plan.settings.run
    if run.engine == "ray":
        from .ray import Actors

        return Actors(make_recipe(plan, store), int(plan.device == "cuda"), run.workers), 2
    if run.workers is None:
        return ThisProcess(partial(make_runner, plan.source, store, plan.initial_states)), 1
    gpus = _gpus(run.workers) if plan.device == "cuda" else None
    return Processes(make_recipe(plan, store), run.workers, gpus), 2


def _gpus(num_workers: int) -> list[str]:
    """Returns one GPU for each worker, as CUDA_VISIBLE_DEVICES names them."""
    import torch

    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    gpus = visible.split(",") if visible else [str(i) for i in range(torch.cuda.device_count())]
    if num_workers > len(gpus):
        raise EngineError(f"--workers {num_workers}: torch sees {len(gpus)} GPUs, and each worker takes one")
    return gpus[:num_workers]
