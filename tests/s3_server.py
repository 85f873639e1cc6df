"""An S3 server for tests: moto behind a door that can lose answers, refuse, and ignore conditions.

moto looks whether an object exists and puts it in two steps, so requests pass the door one at a time: real
servers make a conditional write atomic.
"""

import logging
import threading
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from moto.server import DomainDispatcherApplication, create_backend_app
from werkzeug.serving import make_server

BUCKET = "bucket"
Chooses = Callable[[str, str], bool]  # by method and path


def _none(_method: str, _path: str) -> bool:
    return False


@dataclass
class Door:
    """Every request passes here."""

    endpoint: str = ""
    ignores: tuple[str, ...] = ()
    """Headers that the server does not know, such as HTTP_IF_NONE_MATCH."""
    loses: Chooses = _none
    """Requests that are carried out, but whose answer gets lost."""
    refuses: Chooses = _none
    """What the account may not do."""
    requests: list[tuple[str, str]] = field(default_factory=list)
    _app: Any = field(default_factory=lambda: DomainDispatcherApplication(create_backend_app))
    _one_at_a_time: threading.Lock = field(default_factory=threading.Lock)

    def __call__(self, environ: dict[str, Any], start_response: Any) -> Any:
        method, path = environ["REQUEST_METHOD"], environ["PATH_INFO"]
        self.requests.append((method, path))
        for header in self.ignores:
            environ.pop(header, None)
        if self.refuses(method, path):
            start_response("403 Forbidden", [("Content-Type", "text/xml")])
            return [b"<Error><Code>AccessDenied</Code><Message>Access Denied</Message></Error>"]
        head: list[Any] = []
        with self._one_at_a_time:
            body = b"".join(self._app(environ, lambda *arguments: head.extend(arguments[:2])))
        if self.loses(method, path):
            start_response("503 Service Unavailable", [("Content-Type", "text/xml")])
            return [b"<Error><Code>SlowDown</Code></Error>"]
        start_response(*head)
        return [body]


@contextmanager
def serve_s3() -> Iterator[Door]:
    """The server on the loopback, with one empty bucket."""
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    door = Door()
    server = make_server("127.0.0.1", 0, door, threaded=True)
    door.endpoint = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        with urllib.request.urlopen(urllib.request.Request(f"{door.endpoint}/{BUCKET}", method="PUT")):
            pass
        yield door
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def environment(door: Door) -> dict[str, str]:
    """What a process needs to reach it."""
    return {
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_REGION": "us-east-1",
        "AWS_ENDPOINT_URL": door.endpoint,
    }
