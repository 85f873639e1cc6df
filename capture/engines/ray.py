"""Workers as actors of a Ray cluster, one for each GPU, or where there is none for each CPU node.

Ray places them, tells when one died, and carries a number there and a receipt back. Its own retries are
off: what is done again, and where, the scheduler says. Nothing here depends on how many nodes there are now:
places are counted anew all the time, and an actor that waits for one asks an autoscaling cluster for it.
"""

import logging
import os
import platform
import signal
import socket
import threading
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

from ...errors import ClusterError
from .events import (
    Available,
    Died,
    Done,
    NotStarted,
    Placed,
    Raised,
    Ready,
    Receipt,
    Report,
    Returned,
    Unavailable,
)
from .ray_token import ADVICE, asks_for_token, give_token
from .work import ENDS_RUN, Recipe, RunUnit

PING_S = 0.5
CONNECT_S = 10.0
_STORE_BYTES = 200 << 20  # object store of a local cluster, whose objects are receipts


@contextmanager
def cluster(address: str | None) -> Iterator[None]:
    """Connects to the cluster at an address, or of RAY_ADDRESS; without either it begins one on this machine.

    Raises:
        ClusterError: Ray is not installed, or nothing answers at the address.
    """
    ray = _import_ray()
    if ray.is_initialized():  # our caller connected, and will disconnect
        yield
        return
    address = address or os.environ.get("RAY_ADDRESS")
    if address and address.startswith("ray://"):
        raise ClusterError(
            f"{address} is for Ray clients, who cannot watch nodes: run the command on a node of the "
            "cluster, or send it there with `ray job submit`"
        )
    if address:
        _knock(address)
    else:
        give_token()
    quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
    on_terminate = signal.getsignal(signal.SIGTERM)
    try:
        if address:
            ray.init(address=address, **quiet)
        else:  # "local": without it Ray would look for a cluster that once was, and wait for it
            ray.init("local", include_dashboard=False, object_store_memory=_STORE_BYTES, **quiet)
    except (OSError, ValueError, RuntimeError, ray.exceptions.RayError) as error:
        advice = f"; {ADVICE}" if address and "uthenticat" in str(error) else ""
        raise ClusterError(
            f"no Ray cluster answers at {address or 'this machine'}: {error}{advice}"
        ) from error
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, on_terminate)  # Ray's own leaves at once
    try:
        yield
    finally:
        ray.shutdown()


def num_gpus() -> float:
    """Returns the number of GPUs in the connected cluster now."""
    return _import_ray().cluster_resources().get("GPU", 0)


class Actors:
    """A pool of actors in the cluster that is connected.

    Args:
        recipe: what each of them builds.
        num_gpus: GPUs of each actor; 0 for workers on CPUs.
        num_workers: most that there will be, where known; CPU actors share the nodes' cores accordingly.
    """

    def __init__(self, recipe: Recipe, num_gpus: float, num_workers: int | None = None):
        self._ray = ray = _import_ray()
        self._recipe, self._num_gpus = recipe, num_gpus
        nodes = self._nodes("CPU")
        self._num_cpus = 1 if num_gpus else _cpus_per_worker(nodes, num_workers)
        self._actor_class = ray.remote(
            num_gpus=num_gpus,
            num_cpus=self._num_cpus,
            max_restarts=0,
            max_task_retries=0,
            concurrency_groups={"control": 1},
        )(Actor)
        self._actors: dict[int, Any] = {}
        self._calls: dict[Any, tuple[str, int, int]] = {}  # reference -> what it is, worker, unit
        self._pings_due_s: dict[int, float] = {}

    def __enter__(self) -> "Actors":
        return self

    def __exit__(self, *_: object) -> None:
        for worker in list(self._actors):
            self.kill(worker)

    def num_places(self) -> int:
        share, name = (self._num_gpus, "GPU") if self._num_gpus else (self._num_cpus, "CPU")
        return sum(int(amount // share) for amount in self._nodes(name))

    def start(self, worker: int) -> None:
        self._actors[worker] = actor = self._actor_class.remote()
        self._call("place", worker, actor.where.options(concurrency_group="control").remote())
        self._call("build", worker, actor.build.remote(self._recipe))

    def give(self, worker: int, unit: int) -> None:
        self._call("run", worker, self._actors[worker].run.remote(unit), unit)

    def drain(self) -> None:
        for actor in self._actors.values():
            actor.drain.options(concurrency_group="control").remote()

    def kill(self, worker: int) -> None:
        self._ray.kill(self._actors.pop(worker))
        self._pings_due_s.pop(worker, None)
        self._calls = {ref: call for ref, call in self._calls.items() if call[1] != worker}

    def poll(self, timeout_s: float) -> Iterable[Report]:
        """Raises StoreRefusedError, StoreUnreachableError: no unit can be committed any more."""
        now_s = time.monotonic()
        for worker, due_s in list(self._pings_due_s.items()):
            if now_s >= due_s:
                del self._pings_due_s[worker]
                ping = self._actors[worker].where.options(concurrency_group="control").remote()
                self._call("ping", worker, ping)
        if self._pings_due_s:
            timeout_s = min(timeout_s, PING_S)
        if not self._calls:
            time.sleep(timeout_s)
            return []
        waiting = list(self._calls)
        if self._ray.wait(waiting, num_returns=1, timeout=timeout_s)[0]:
            ready, _ = self._ray.wait(waiting, num_returns=len(waiting), timeout=0)
            heard = [report for ref in ready if (report := self._heard(ref)) is not None]
            for report in heard:
                if isinstance(report, (Died, NotStarted)) and report.worker in self._actors:
                    self.kill(report.worker)  # its other calls say the same
            # what it did before it died comes first
            return sorted(heard, key=lambda report: isinstance(report, (Died, Unavailable)))
        return []

    def _heard(self, reference: Any) -> Report | None:
        what, worker, unit = self._calls.pop(reference)
        errors = self._ray.exceptions
        try:
            answer = self._ray.get(reference)
        except errors.ActorUnavailableError:
            self._pings_due_s.setdefault(worker, time.monotonic() + PING_S)
            return Unavailable(worker, unit)
        except errors.RayTaskError as error:  # our own code raised, outside of what it catches
            return NotStarted(worker, str(error)) if what == "build" else Raised(worker, unit, str(error))
        except errors.RayError as error:
            return Died(worker, _one_line(error))
        return self._answered(what, worker, unit, answer)

    def _answered(self, what: str, worker: int, unit: int, answer: Any) -> Report | None:
        if what == "place":
            return Placed(worker, answer)
        if what == "ping":
            return Available(worker)
        if what == "build":
            return Ready(worker) if answer is None else NotStarted(worker, answer)
        kind, detail = answer
        if kind == "done":
            return Done(worker, unit, detail)
        if kind == "raised":
            return Raised(worker, unit, detail)
        if kind == "ends run":
            raise detail
        assert kind == "returned", kind
        return Returned(worker, unit)

    def _call(self, what: str, worker: int, reference: Any, unit: int = -1) -> None:
        self._calls[reference] = what, worker, unit

    def _nodes(self, resource: str) -> list[float]:
        """Returns how much of a resource each living node has."""
        return [node["Resources"].get(resource, 0) for node in self._ray.nodes() if node["Alive"]]


class Actor:
    """The worker in its Ray actor. `build` and `run` are called one at a time, the rest beside them."""

    def __init__(self) -> None:
        self._run: RunUnit | None = None
        self._is_draining = threading.Event()
        self._count: Callable[[str, float], None] | None = None

    def where(self) -> str:
        return f"{platform.node()}, process {os.getpid()}"

    def drain(self) -> None:
        self._is_draining.set()

    def build(self, recipe: Recipe) -> str | None:
        """Builds the worker; returns None, or why it cannot be built."""
        try:
            self._run = recipe()
        except Exception as error:
            return f"{self.where()}: {type(error).__name__}: {error}"
        self._count = _counters()
        return None

    def run(self, unit: int) -> tuple[str, Receipt | str | Exception | None]:
        assert self._run is not None and self._count is not None
        if self._is_draining.is_set():
            return "returned", None
        try:
            receipt = self._run(unit)
        except ENDS_RUN as error:
            self._is_draining.set()  # so will it be for what waits
            return "ends run", error
        except Exception:
            # whatever a model or a driver throws belongs to this unit alone
            self._count("failures", 1)
            return "raised", traceback.format_exc()
        self._count("units", 1)
        self._count("tokens", receipt.num_tokens)
        self._count("bytes", receipt.num_bytes)
        return "done", receipt


def _counters() -> Callable[[str, float], None]:
    """Counters that Prometheus reads from Ray; they come late and die with a worker, so nothing is decided by
    them.
    """
    from ray.util.metrics import Counter

    counters = {
        "units": Counter("looptap_units", "Units committed."),
        "tokens": Counter("looptap_tokens", "Tokens captured."),
        "bytes": Counter("looptap_bytes", "Bytes committed."),
        "failures": Counter("looptap_failures", "Units that raised."),
    }
    # a counter takes no zero
    return lambda name, amount: counters[name].inc(amount) if amount else None


def _cpus_per_worker(nodes: list[float], num_workers: int | None) -> int:
    """Returns an equal share of all cores, at most those of the smallest node; without a number, a node's."""
    sizes = [int(cpus) for cpus in nodes if cpus >= 1] or [1]
    share = sum(sizes) // num_workers if num_workers else max(sizes)
    return max(1, min(min(sizes), share))


def _one_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    told = next((line for line in lines if line.startswith(("The actor is dead because", "The node"))), None)
    return told or (lines[0] if lines else type(error).__name__)


def _knock(address: str) -> None:
    """Raises ClusterError if nothing answers at the address, or asks for a token that Ray would not send."""
    host, _, port = address.rpartition(":")
    if not port.isdigit():
        return  # "auto", or a form that Ray explains better
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=CONNECT_S).close()
    except OSError as error:  # Ray itself would try for minutes
        raise ClusterError(f"no Ray cluster answers at {address}: {error}") from error
    if asks_for_token(address) and "RAY_AUTH_MODE" not in os.environ:
        from ray._raylet import Config  # pyright: ignore[reportAttributeAccessIssue]

        os.environ["RAY_AUTH_MODE"] = "token"
        Config.initialize("")  # which read the environment when Ray was imported


def _import_ray() -> ModuleType:
    try:
        import ray
        import ray.exceptions
    except ImportError as error:
        raise ClusterError("--engine ray needs Ray: pip install 'looptap[ray]'") from error
    return ray
