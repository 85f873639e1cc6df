"""Waits for an object store that is away: every request to one is made here, and tried again for minutes.

obstore's own retries do not send a put again whose answer timed out, and nothing interrupts them. Here each
request has a thread of its own, so that whoever waits for it can be interrupted, and one loop tries it again.
Threads share what they know of a server: they give up together, and the first says that it is away.

obstore's coroutines would do without threads, but theirs may need Python while it exits, which aborts it.
"""

import logging
import random
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, InvalidStateError
from contextlib import suppress
from functools import cache
from itertools import count
from typing import TypeVar

PATIENCE_S = 300.0  # how long a server that was there before is waited for
FIRST_S = 10.0  # and one that never answered, whose address may be wrong
SAY_S = 1.0  # what is over sooner is not worth a line
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.1, 5.0

Answer = TypeVar("Answer")

_log = logging.getLogger("looptap.store")


class Away(Exception):
    """A server did not answer, or said that it cannot now; the text is why."""


class Server:
    """What this process knows of the server of a bucket."""

    def __init__(self, name: str) -> None:
        self._name = name
        self.has_answered = False
        """Whether there is a server at all, whatever it says."""
        self._away_since_s: float | None = None
        self._is_said = False
        self._lock = threading.Lock()

    def ask(self, request: Callable[[], Answer], unwanted: threading.Event) -> Answer:
        """Makes a request, again and again while it raises Away and there is patience.

        Args:
            unwanted: set when nobody waits for the answer any more.
        Raises:
            Away: there is none left. Any other error of the request is an answer of the server, and raised.
        """
        first_s: float | None = None
        for number in count():
            sent_s = time.monotonic()
            try:
                answer = request()
            except Away as away:
                first_s = sent_s if first_s is None else first_s
                pause_s = min(_LONGEST_PAUSE_S, _FIRST_PAUSE_S * 2 ** min(number, 10))
                pause_s *= random.uniform(0.5, 1.0)  # many workers must not keep step
                self._require_patience(first_s, sent_s, pause_s, away)
                if unwanted.wait(pause_s):
                    raise
            except Exception:
                self._answers()
                raise
            else:
                self._answers()
                return answer
        raise AssertionError

    def _require_patience(self, first_s: float, sent_s: float, pause_s: float, away: Away) -> None:
        """Raises Away if this request, or the server, has been failing for too long; else it may say so."""
        now_s = time.monotonic()
        with self._lock:
            if self._away_since_s is None:
                self._away_since_s = sent_s
            since_s = min(first_s, self._away_since_s)
            patience_s = PATIENCE_S if self.has_answered else FIRST_S
            is_news = (
                not self._is_said and now_s - since_s < patience_s and now_s + pause_s - since_s >= SAY_S
            )
            self._is_said |= is_news
        if now_s - since_s >= patience_s:
            raise Away(f"{away}; it was tried for {_duration(now_s - since_s)}") from None
        if is_news:
            left = _duration(patience_s)
            _log.warning("%s does not answer (%s); trying again for %s", self._name, away, left)

    def _answers(self) -> None:
        with self._lock:
            since_s, was_said = self._away_since_s, self._is_said
            self.has_answered, self._away_since_s, self._is_said = True, None, False
        if since_s is not None and was_said:
            _log.warning("%s answers again, after %s", self._name, _duration(time.monotonic() - since_s))


@cache
def server_at(bucket: str, endpoint: str | None) -> Server:
    """Returns the one Server of this process for a bucket at an endpoint."""
    return Server(f"s3://{bucket} ({endpoint or 'AWS'})")


def start(task: Callable[[threading.Event], Answer]) -> "Future[Answer]":
    """Runs a task on a thread that keeps no process alive; its event says that the future was cancelled."""
    future: Future[Answer] = Future()
    unwanted = threading.Event()
    future.add_done_callback(lambda _: unwanted.set())

    def run() -> None:
        try:
            answer = task(unwanted)
        except BaseException as error:
            with suppress(InvalidStateError):  # cancelled
                future.set_exception(error)
        else:
            with suppress(InvalidStateError):
                future.set_result(answer)

    threading.Thread(target=run, name="looptap request", daemon=True).start()
    return future


def _duration(seconds: float) -> str:
    return f"{seconds / 60:.3g} min" if seconds >= 60 else f"{seconds:.3g} s"
