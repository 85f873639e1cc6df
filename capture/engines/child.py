"""A worker in a process of its own: `python -m looptap.capture.engines.child DESCRIPTOR PARENT`.

It lives as long as its driver does and not a moment longer, and leaves the terminal's and a job manager's
signals to the driver, which then lets it finish. It is told what to do through the pipe DESCRIPTOR.
"""

import ctypes
import logging
import os
import platform
import queue
import signal
import sys
import threading
import traceback
from multiprocessing.connection import Connection

from .work import ENDS_RUN, Recipe, RunUnit

_PR_SET_PDEATHSIG = 1


def main(descriptor: int, parent: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    # that an object store is away the driver says for all
    logging.getLogger("looptap.store").addHandler(logging.NullHandler())
    die_with(parent)
    driver = Connection(descriptor)
    driver.send(("placed", f"{platform.node()}, process {os.getpid()}"))
    recipe: Recipe
    recipe, num_threads = driver.recv()
    try:
        if num_threads is not None:
            import torch

            torch.set_num_threads(num_threads)
        run = recipe()
    except Exception as error:
        driver.send(("not started", f"{type(error).__name__}: {error}"))
        return
    driver.send(("ready", None))
    _work(driver, run)


def die_with(parent: int) -> None:
    """Asks the kernel to kill this process when its parent dies, however that happens (Linux)."""
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it died before we asked
        os._exit(1)


def _work(driver: Connection, run: RunUnit) -> None:
    units: queue.SimpleQueue[int] = queue.SimpleQueue()
    is_draining = threading.Event()
    threading.Thread(target=_listen, args=(driver, units, is_draining), daemon=True).start()
    while True:
        unit = units.get()
        if is_draining.is_set():
            driver.send(("returned", unit))
            continue
        try:
            driver.send(("done", (unit, run(unit))))
        except ENDS_RUN as error:
            driver.send(("ends run", error))
            return  # so will it be for what waits
        except Exception:
            # whatever a model or a driver throws belongs to this unit alone
            driver.send(("raised", (unit, traceback.format_exc())))


def _listen(driver: Connection, units: "queue.SimpleQueue[int]", is_draining: threading.Event) -> None:
    """Takes orders while a unit runs; ends this process when its driver is gone."""
    while True:
        try:
            order = driver.recv()
        except (EOFError, OSError):
            os._exit(1)
        if order is None:
            is_draining.set()
        else:
            units.put(order)


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]))
