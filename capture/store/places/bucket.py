"""A prefix in a bucket that speaks S3, through obstore: requests, conditions, errors that say what to do.

A server that ignores conditions is refused (`probe`). Who put an object is in its metadata: an answer that
got lost is told from a name that was taken, and one attempt's bytes from another's, though they may be the
same.
"""

import os
import platform
import secrets
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime, timedelta
from functools import cached_property
from typing import TYPE_CHECKING, Any

from ....errors import BucketMissingError, StoreAddressError, StoreError, StoreUnreachableError
from .place import Bytes

if TYPE_CHECKING:
    from obstore.store import S3Store

_RETRIES: dict[str, Any] = {"max_retries": 5, "retry_timeout": timedelta(seconds=60)}
_REQUEST_S = 30
_UPLOAD_S = 900  # half a gibibyte at 0.6 MB/s
_SMALL_BYTES = 4 << 20
_WRITER = "looptap-writer"


@dataclass(frozen=True)
class Found:
    """Facts about an object, known without reading it."""

    e_tag: str
    writer: str | None
    num_bytes: int
    modified: datetime
    """Time of the last change, by the server's clock."""


class Bucket:
    """A prefix in a bucket. Credentials and endpoint come from AWS_* variables."""

    def __init__(self, url: str):
        bucket, _, prefix = url.removeprefix("s3://").partition("/")
        if not bucket:
            raise StoreAddressError(f"{url} names no bucket: give s3://bucket/prefix")
        try:
            import obstore  # noqa: F401
        except ImportError as error:
            raise StoreUnreachableError(
                f"{url} is reached through obstore: pip install 'looptap[s3]'"
            ) from error
        self.url, self._bucket, self._prefix = url.rstrip("/"), bucket, prefix.strip("/")
        self._endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")

    def __str__(self) -> str:
        return self.url

    @property
    def address(self) -> str:
        return self.url

    def __reduce__(self) -> tuple[Any, ...]:  # connections stay in their process
        return type(self), (self.url,)

    def names(self, folder: str) -> list[str]:
        import obstore

        with self.explained(f"list {folder or 'the store'}"):
            found = obstore.list_with_delimiter(self.client, folder or None)
        paths = [*found["common_prefixes"], *(meta["path"] for meta in found["objects"])]
        return [path.rpartition("/")[2] for path in paths]

    def file_names(self, folder: str) -> list[str]:
        return list(self.sizes(folder))

    def sizes(self, folder: str) -> dict[str, int]:
        import obstore

        with self.explained(f"list {folder}"):
            found = obstore.list_with_delimiter(self.client, folder)
        return {meta["path"].rpartition("/")[2]: meta["size"] for meta in found["objects"]}

    def exists(self, key: str) -> bool:
        return self.find(key) is not None if key else bool(self.names(""))

    def read(self, key: str) -> bytes:
        import obstore

        with self.explained(f"read {key}"):
            return bytes(obstore.get(self.client, key).bytes())

    def read_range(self, key: str, offset: int, num_bytes: int) -> bytes:
        import obstore

        with self.explained(f"read {key}"):
            return bytes(obstore.get_range(self.client, key, start=offset, length=num_bytes))

    def create(self, key: str, data: bytes) -> None:
        writer = make_token()
        self.put(key, data, writer=writer, over=None)

    def replace(self, key: str, data: bytes) -> None:
        import obstore

        with self.explained(f"write {key}"):
            obstore.put(self.client, key, data, use_multipart=False)

    def remove(self, keys: Iterable[str]) -> None:
        import obstore

        with self.explained("remove objects"):
            if keys := list(keys):
                obstore.delete(self.client, keys)

    def find(self, key: str) -> Found | None:
        """Returns what is known of an object without reading it; None if there is none."""
        import obstore

        try:
            with self.explained(f"look at {key}"):
                found = obstore.get(self.client, key, options={"head": True})
                meta = found.meta
        except FileNotFoundError:
            return None
        writer = found.attributes.get(_WRITER)
        return Found(str(meta["e_tag"]), writer, meta["size"], meta["last_modified"])

    def put(self, key: str, data: Bytes, *, writer: str, over: str | None) -> str:
        """Puts an object if the name is free, or while what has it is still `over`, an e_tag; returns its
        own.

        A request that was sent twice, because its answer got lost, may be refused on account of itself.

        Raises:
            FileExistsError: something else has the name, or has it now.
        """
        import obstore
        from obstore.exceptions import AlreadyExistsError, PreconditionError

        client = self.client if len(data) <= _SMALL_BYTES else self._uploads
        try:
            with self.explained(f"write {key}"):
                done = obstore.put(
                    client,
                    key,
                    data,
                    attributes={_WRITER: writer},
                    mode="create" if over is None else {"e_tag": over},
                    use_multipart=False,
                )
                return str(done["e_tag"])
        except (AlreadyExistsError, PreconditionError):
            found = self.find(key)
            if found is None or found.writer != writer:
                raise FileExistsError(f"{self.url}/{key} was put by another") from None
            return found.e_tag

    def probe(self) -> datetime:
        """Checks that the server honours conditions; returns its time now.

        Raises:
            StoreError: it does not: attempts and drivers could not be kept apart.
        """
        key = f".looptap/probe.{make_token()}"
        try:
            self.put(key, b"1", writer="1", over=None)
            found = self.find(key)
            assert found is not None
            for what, over in (("If-None-Match", None), ("If-Match", '"0"')):
                try:
                    self.put(key, b"2", writer="2", over=over)
                except FileExistsError:
                    continue
                raise StoreError(
                    f"the server of {self.url} ignores {what}: two drivers, or a worker thought dead, could "
                    f"overwrite each other there; capture to a server with conditional writes or to a disk"
                )
            return found.modified
        finally:
            self.remove([key])

    @cached_property
    def client(self) -> "S3Store":
        return self._connect(_REQUEST_S)

    @cached_property
    def _uploads(self) -> "S3Store":
        return self._connect(_UPLOAD_S)

    def _connect(self, timeout_s: int) -> "S3Store":
        from obstore.store import S3Store

        options: dict[str, Any] = {"timeout": timedelta(seconds=timeout_s)}
        if (self._endpoint or "").startswith("http://"):
            options["allow_http"] = True
        with self.explained("connect"):
            return S3Store(
                self._bucket,
                prefix=self._prefix or None,
                config={"endpoint": self._endpoint} if self._endpoint else None,
                client_options=options,  # pyright: ignore[reportArgumentType]
                retry_config=_RETRIES,  # pyright: ignore[reportArgumentType]
            )

    @contextmanager
    def explained(self, task: str) -> Iterator[None]:
        """Turns errors of obstore into one line that says what to do; absence and failed conditions pass."""
        from obstore import exceptions as o

        try:
            yield
        except (o.AlreadyExistsError, o.PreconditionError):
            raise
        except (FileNotFoundError, o.BaseError) as error:
            where = f"{self.url} ({self._endpoint or 'AWS'})"
            said = str(error).partition("\n\nDebug source")[0]
            if "NoSuchBucket" in said:
                raise BucketMissingError(
                    f"{where}: there is no bucket {self._bucket}: make it, or mend the URL"
                ) from None
            if isinstance(error, FileNotFoundError):
                raise
            if (
                isinstance(error, o.PermissionDeniedError | o.UnauthenticatedError)
                or "169.254.169.254" in said
            ):
                raise StoreError(
                    f"{where} does not let this account {task}: check AWS_ACCESS_KEY_ID, "
                    f"AWS_SECRET_ACCESS_KEY and what they may do ({said})"
                ) from None
            raise StoreUnreachableError(
                f"{where}: could not {task}: check AWS_ENDPOINT_URL and AWS_REGION, and that the server "
                f"answers ({said})"
            ) from None


def make_token() -> str:
    """Returns a token that names one writer among all."""
    return f"{platform.node()}.{os.getpid()}.{secrets.token_hex(8)}"
