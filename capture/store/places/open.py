"""Opens the place that a path or URL names."""

from pathlib import Path

from ....errors import StoreAddressError
from .address import is_url
from .directory import LocalPlace
from .objects import ObjectPlace


def open_place(path: str | Path, is_known: bool = False) -> LocalPlace | ObjectPlace:
    """Opens a local directory or `s3://bucket/prefix`; nothing need be there yet.

    Args:
        is_known: whether another process was there already, so that a server that is away is waited for.
    Raises:
        StoreAddressError: another kind of URL, or one that cannot be.
        StoreUnreachableError: obstore, which reaches S3, is not installed.
    """
    text = str(path)
    if is_url(text):
        return ObjectPlace(text, is_known)
    if "://" in text:
        raise StoreAddressError(f"{text} cannot hold a store: give a local directory or s3://bucket/prefix")
    return LocalPlace(Path(path))
