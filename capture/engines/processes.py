"""Workers in processes of this machine: one for each GPU, or several that share the CPU's cores.

They take orders and report through pipes, so that a death is noticed as the end of its pipe, at once and
after everything it had said before.
"""

import os
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import suppress
from multiprocessing import Pipe
from multiprocessing.connection import Connection, wait
from typing import Any

from .events import Died, Done, NotStarted, Placed, Raised, Ready, Receipt, Report, Returned
from .work import Recipe

DEATH_S = 5.0  # a process that is killed needs less, unless it waits inside the kernel


class Processes:
    """A pool of `num_workers` processes.

    Args:
        recipe: what each of them builds; it travels by pickle.
        gpus: one for each worker, as CUDA_VISIBLE_DEVICES names them; None for workers on the CPU, which
            share its cores.
    """

    def __init__(self, recipe: Recipe, num_workers: int, gpus: list[str] | None = None):
        self._recipe, self._num_workers, self._gpus = recipe, num_workers, gpus
        self._children: dict[int, tuple[subprocess.Popen[bytes], Connection]] = {}
        self._gpu_of: dict[int, str] = {}
        self._dying: dict[int, subprocess.Popen[bytes]] = {}

    def __enter__(self) -> "Processes":
        return self

    def __exit__(self, *_: object) -> None:
        for child, _pipe in self._children.values():
            child.kill()  # all of them, before any is waited for
        end_s = time.monotonic() + DEATH_S
        for worker in list(self._children):
            self._end(worker, end_s)

    def num_places(self) -> int:
        for worker, child in list(self._dying.items()):
            if child.poll() is not None:
                del self._dying[worker]
                self._gpu_of.pop(worker, None)
        return self._num_workers - len(self._dying)

    def start(self, worker: int) -> None:
        ours, theirs = Pipe()
        # it imports what we import, from where we do; -P leaves the directory that it stands in out of it
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
        if self._gpus is not None:
            self._gpu_of[worker] = next(gpu for gpu in self._gpus if gpu not in self._gpu_of.values())
            environment["CUDA_VISIBLE_DEVICES"] = self._gpu_of[worker]
        with theirs:
            child = subprocess.Popen(
                [sys.executable, "-P", "-m", f"{__package__}.child", str(theirs.fileno()), str(os.getpid())],
                env=environment,
                pass_fds=[theirs.fileno()],
                process_group=0,  # a terminal's Ctrl-C is for the driver
                stdin=subprocess.DEVNULL,
            )
        self._children[worker] = child, ours
        self._tell(worker, (self._recipe, self._num_threads()))

    def give(self, worker: int, unit: int) -> None:
        self._tell(worker, unit)

    def drain(self) -> None:
        for worker in self._children:
            self._tell(worker, None)

    def kill(self, worker: int) -> None:
        self._end(worker, time.monotonic() + DEATH_S)

    def poll(self, timeout_s: float) -> Iterable[Report]:
        """Raises StoreRefusedError, StoreUnreachableError: no unit can be committed any more."""
        of_pipe = {pipe: worker for worker, (_, pipe) in self._children.items()}
        if not of_pipe:
            time.sleep(timeout_s)  # wait() of nothing returns at once
        reports: list[Report] = []
        for pipe in wait(list(of_pipe), timeout_s):
            assert isinstance(pipe, Connection)
            reports += self._heard(of_pipe[pipe], pipe)
        return reports

    def _end(self, worker: int, end_s: float) -> None:
        """Kills a worker. One that waits inside the kernel, for a disk or a GPU, lives on with its GPU."""
        child, pipe = self._children.pop(worker)
        self._dying[worker] = child
        child.kill()
        pipe.close()
        with suppress(subprocess.TimeoutExpired):
            child.wait(max(0.0, end_s - time.monotonic()))

    def _heard(self, worker: int, pipe: Connection) -> Iterator[Report]:
        try:
            while pipe.poll():
                report = _report(worker, *pipe.recv())
                yield report
                if isinstance(report, NotStarted):
                    return self.kill(worker)  # its GPU is free for the next
        except (EOFError, ConnectionError):
            child, _ = self._children[worker]
            with suppress(subprocess.TimeoutExpired):
                child.wait(DEATH_S)
            self.kill(worker)
            yield Died(worker, f"exit {child.returncode}")

    def _tell(self, worker: int, order: Any) -> None:
        with suppress(ConnectionError):  # it is dead, which the next poll finds
            self._children[worker][1].send(order)

    def _num_threads(self) -> int | None:
        """Threads of torch in each worker; None where OMP_NUM_THREADS is set, or GPUs do the work."""
        if self._gpus is not None or "OMP_NUM_THREADS" in os.environ:
            return None
        of_us = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        return max(1, of_us // self._num_workers)


def _report(worker: int, what: str, detail: Any) -> Report:
    match what:
        case "placed":
            return Placed(worker, detail)
        case "ready":
            return Ready(worker)
        case "not started":
            return NotStarted(worker, detail)
        case "done":
            unit, receipt = detail
            assert isinstance(receipt, Receipt)
            return Done(worker, unit, receipt)
        case "returned":
            return Returned(worker, detail)
        case "raised":
            return Raised(worker, *detail)
        case "ends run":
            raise detail
    raise AssertionError(what)
