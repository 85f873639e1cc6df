"""A Hub for tests: a real HTTP server on the loopback, with the part of the protocol that downloads use.

Small files are served at their own address, safetensors by a redirect to another host name, as the Hub's are.
It counts what it sends, and can ask for a token, break a transfer off, and damage one.
"""

import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

_RESOLVE = re.compile(r"/(?P<id>[^/]+/[^/]+)/resolve/(?P<revision>[^/]+)/(?P<name>.+)")
_TREE = re.compile(r"/api/models/(?P<id>[^/]+/[^/]+)/tree/(?P<revision>[^/]+)")


@dataclass(frozen=True)
class Request:
    """What was asked, and how many bytes of a body went out."""

    method: str
    path: str
    name: str
    """Name of the file, without its folder; empty if none was asked for."""
    first_byte: int
    status: int
    authorization: str | None
    num_bytes: int


@dataclass
class Repository:
    """Files by commit and name, and the commits of branches and tags."""

    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)
    token: str | None = None
    """Token without which the repository is not there, or not to be read if it is gated."""
    is_gated: bool = False


class Hub:
    """What the server serves and has seen; tests change it while it runs."""

    def __init__(self, port: int) -> None:
        self.endpoint = f"http://127.0.0.1:{port}"
        self.storage = f"http://localhost:{port}"  # another host to a client, which sends it no token
        self.repositories: dict[str, Repository] = {}
        self.requests: list[Request] = []
        self.cuts: dict[str, int] = {}
        """Bytes, by file name, after which its next transfer of more than these breaks off."""
        self.stalls: dict[str, int] = {}
        """The same, but the client is left waiting until it goes away."""
        self.stalled = threading.Event()
        """Set when a client has been left waiting."""
        self.damaged: set[str] = set()
        """Names of files whose next transfer of the whole ends in a wrong byte."""
        self.is_down = False
        """Answers everything with 503."""

    def add(self, id: str, files: dict[str, bytes], branch: str = "main") -> str:
        """Commits files to a branch; returns the commit."""
        repository = self.repositories.setdefault(id, Repository())
        digests = [f"{name} {hashlib.sha1(body).hexdigest()}" for name, body in sorted(files.items())]
        commit = hashlib.sha1("\n".join(digests).encode()).hexdigest()
        repository.commits[commit] = files
        repository.refs[branch] = commit
        return commit

    def asked_for(self) -> set[str]:
        """Names of all files that were asked for, by HEAD or GET."""
        return {request.name for request in self.requests if request.name}

    def num_bytes(self, name: str) -> int:
        """Returns the bytes of a file that were sent."""
        return sum(request.num_bytes for request in self.requests if request.name == name)


@contextmanager
def serve_hub() -> Iterator[Hub]:
    """A running server on a free port of this machine."""

    class Handler(_Handler):
        pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.daemon_threads = True
        Handler.hub = Hub(server.server_address[1])
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        try:
            yield Handler.hub
        finally:
            server.shutdown()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub

    def log_message(self, format: str, *args: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def _answer(self) -> None:
        path = urlsplit(self.path).path
        if self.hub.is_down:
            self._send(HTTPStatus.SERVICE_UNAVAILABLE)
        elif path.startswith("/storage/"):
            _, _, digest, name = path.split("/")
            self._send_file(name, self._stored(digest))
        elif match := _RESOLVE.fullmatch(path) or _TREE.fullmatch(path):
            found = {key: unquote(value) for key, value in match.groupdict().items()}
            self._answer_repository(found["id"], found["revision"], found.get("name"))
        else:
            self._send(HTTPStatus.NOT_FOUND)

    def _answer_repository(self, id: str, revision: str, name: str | None) -> None:
        repository = self.hub.repositories.get(id)
        sent = self.headers.get("authorization")
        allowed = repository is not None and repository.token in (None, (sent or "").removeprefix("Bearer "))
        if sent == "Bearer expired":
            message = "Invalid credentials in Authorization header"
            return self._send(HTTPStatus.UNAUTHORIZED, {"X-Error-Message": message}, name)
        if repository is None or (not allowed and not repository.is_gated):
            status = HTTPStatus.NOT_FOUND if sent else HTTPStatus.UNAUTHORIZED
            return self._send(status, {"X-Error-Code": "RepoNotFound"}, name)
        if not allowed and name is not None:  # anybody may list a gated repository
            status = HTTPStatus.FORBIDDEN if sent else HTTPStatus.UNAUTHORIZED
            return self._send(status, {"X-Error-Code": "GatedRepo"}, name)
        commit = repository.refs.get(revision, revision)
        if commit not in repository.commits:
            return self._send(HTTPStatus.NOT_FOUND, {"X-Error-Code": "RevisionNotFound"}, name)
        files, headers = repository.commits[commit], {"X-Repo-Commit": commit}
        if name is None:
            tree = [
                {"type": "file", "path": path, "size": len(body), "oid": hashlib.sha1(body).hexdigest()}
                for path, body in files.items()
            ]
            return self._send(HTTPStatus.OK, body=json.dumps(tree).encode())
        if name not in files:
            return self._send(HTTPStatus.NOT_FOUND, headers | {"X-Error-Code": "EntryNotFound"}, name)
        body = files[name]
        if not name.endswith(".safetensors"):
            headers["ETag"] = f'"{hashlib.sha1(body).hexdigest()}"'
            return self._send_file(name, body, headers)
        digest = hashlib.sha256(body).hexdigest()
        headers |= {"X-Linked-Etag": f'"{digest}"', "X-Linked-Size": str(len(body))}
        headers["Location"] = f"{self.hub.storage}/storage/{digest}/{name.rpartition('/')[2]}"
        return self._send(HTTPStatus.FOUND, headers, name)

    def _stored(self, digest: str) -> bytes:
        bodies = (
            body
            for repository in self.hub.repositories.values()
            for files in repository.commits.values()
            for body in files.values()
        )
        return next(body for body in bodies if hashlib.sha256(body).hexdigest() == digest)

    def _send_file(self, name: str, body: bytes, headers: dict[str, str] | None = None) -> None:
        headers = {"Accept-Ranges": "bytes", **(headers or {})}
        wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("range") or "")
        if wanted is None:
            if self.command == "GET" and name in self.hub.damaged:
                self.hub.damaged.remove(name)
                body = body[:-1] + bytes([body[-1] ^ 1])
            return self._send(HTTPStatus.OK, headers, name, body)
        first, last = int(wanted[1]), int(wanted[2] or len(body) - 1)
        part = body[first : last + 1]
        headers["Content-Range"] = f"bytes {first}-{first + len(part) - 1}/{len(body)}"
        return self._send(HTTPStatus.PARTIAL_CONTENT, headers, name, part, first)

    def _send(
        self,
        status: HTTPStatus,
        headers: dict[str, str] | None = None,
        name: str | None = None,
        body: bytes = b"",
        first_byte: int = 0,
    ) -> None:
        self.send_response(status)
        for key, value in (headers or {}).items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        file_name = (name or "").rpartition("/")[2]
        num_bytes = len(body) if self.command == "GET" else 0
        if self.hub.cuts.get(file_name, num_bytes) < num_bytes:
            num_bytes = self.hub.cuts.pop(file_name)
            self.close_connection = True
        if self.hub.stalls.get(file_name, num_bytes) < num_bytes:
            num_bytes = self.hub.stalls.pop(file_name)
            self.close_connection = True
            self.wfile.write(body[:num_bytes])
            self.hub.stalled.set()
            with suppress(ConnectionError):
                self.connection.recv(1)  # nothing more will come
        else:
            self.wfile.write(body[:num_bytes])
        sent = self.headers.get("authorization")
        request = Request(self.command, self.path, name or "", first_byte, status, sent, num_bytes)
        self.hub.requests.append(request)
