"""An S3 server for tests: moto behind a door that can lose answers, refuse, ignore conditions, and be away.

moto looks whether an object exists and puts it in two steps, so requests pass the door one at a time: real
servers make a conditional write atomic.
"""

import logging
import os
import socket
import struct
import threading
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import pytest
from moto.server import DomainDispatcherApplication, create_backend_app
from werkzeug.serving import make_server

BUCKET = "bucket"
OUTAGES = ("stopped", "paused", "reset", "cut", "answer lost", "500", "503", "429")
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
    outage: str = ""
    """One of OUTAGES while `away`."""
    _app: Any = field(default_factory=lambda: DomainDispatcherApplication(create_backend_app))
    _one_at_a_time: threading.Lock = field(default_factory=threading.Lock)
    _is_open: threading.Event = field(default_factory=threading.Event)
    _server: Any = None
    _port: int = 0

    def __call__(self, environ: dict[str, Any], start_response: Any) -> Any:
        method, path = environ["REQUEST_METHOD"], environ["PATH_INFO"]
        self._is_open.wait()
        outage = self.outage
        if outage == "reset":
            _reset(environ)
        if outage.isdigit():
            start_response(f"{outage} Busy", [("Content-Type", "text/xml")])
            return [b"<Error><Code>SlowDown</Code></Error>"]
        self.requests.append((method, path))
        for header in self.ignores:
            environ.pop(header, None)
        if self.refuses(method, path):
            start_response("403 Forbidden", [("Content-Type", "text/xml")])
            return [b"<Error><Code>AccessDenied</Code><Message>Access Denied</Message></Error>"]
        head: list[Any] = []
        with self._one_at_a_time:
            body = b"".join(self._app(environ, lambda *arguments: head.extend(arguments[:2])))
        if outage == "answer lost":
            _reset(environ)
        if outage == "cut":
            half, (status, headers) = body[: len(body) // 2], head
            lines = [f"{name}: {value}" for name, value in headers if name.lower() != "content-length"]
            lines = [f"HTTP/1.0 {status}", *lines, f"Content-Length: {len(half) + 1}", "", ""]
            environ["werkzeug.socket"].sendall("\r\n".join(lines).encode() + half)
            _reset(environ)
        if self.loses(method, path):
            start_response("503 Service Unavailable", [("Content-Type", "text/xml")])
            return [b"<Error><Code>SlowDown</Code></Error>"]
        start_response(*head)
        return [body]

    def open(self) -> None:
        """Listens, on the port that it had before."""
        self._server = make_server("127.0.0.1", self._port, self, threaded=True)
        self._server.handle_error = lambda *_: None  # a connection that we reset
        self._port = self._server.server_port
        self.endpoint = f"http://127.0.0.1:{self._port}"
        self._is_open.set()
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()

    def leave(self, outage: str) -> None:
        """Is away in one of OUTAGES: nobody listens, or nothing is answered, or what comes is an error."""
        self.outage = outage
        if outage == "stopped":
            self.close()
        elif outage == "paused":
            self._is_open.clear()

    def come_back(self) -> None:
        outage, self.outage = self.outage, ""
        if outage == "stopped":
            self.open()
        self._is_open.set()

    @contextmanager
    def away(self, outage: str) -> Iterator[None]:
        """Is away until the body ends."""
        self.leave(outage)
        try:
            yield
        finally:
            self.come_back()


def _reset(environ: dict[str, Any]) -> None:
    """Ends the connection by a reset, with whatever was answered until now."""
    connection: socket.socket = environ["werkzeug.socket"]
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    os.close(connection.detach())  # close() would wait for files made of it
    raise ConnectionResetError


@contextmanager
def serve_s3() -> Iterator[Door]:
    """The server on the loopback, with one empty bucket; all of a process have the same objects."""
    logging.getLogger("werkzeug").setLevel(logging.CRITICAL)
    door = Door()
    door.open()
    try:
        with urllib.request.urlopen(urllib.request.Request(f"{door.endpoint}/{BUCKET}", method="PUT")):
            pass
        yield door
    finally:
        door.close()


@contextmanager
def serve_s3_here() -> Iterator[Door]:
    """The same, and nothing but it, in this process's environment."""
    with serve_s3() as door, pytest.MonkeyPatch.context() as patch:
        for name in [name for name in os.environ if name.startswith("AWS_")]:
            patch.delenv(name)
        for name, value in environment(door).items():
            patch.setenv(name, value)
        yield door


def environment(door: Door) -> dict[str, str]:
    """What a process needs to reach it."""
    return {
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_REGION": "us-east-1",
        "AWS_ENDPOINT_URL": door.endpoint,
    }
