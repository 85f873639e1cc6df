"""Opens the place that a path or URL names."""

from pathlib import Path

from ....errors import StoreAddressError
from .directory import LocalPlace
from .objects import ObjectPlace


def open_place(path: str | Path) -> LocalPlace | ObjectPlace:
    """Opens a local directory or `s3://bucket/prefix`; nothing need be there yet.

    Raises:
        StoreAddressError: another kind of URL.
        StoreUnreachableError: obstore, which reaches S3, is not installed.
    """
    text = str(path)
    if text.startswith("s3://"):
        return ObjectPlace(text)
    if isinstance(path, Path) and text.startswith("s3:/"):
        raise StoreAddressError(f"{text} lost a slash in a pathlib.Path: give s3://… as text")
    if "://" in text:
        raise StoreAddressError(f"{text} cannot hold a store: give a local directory or s3://bucket/prefix")
    return LocalPlace(Path(path))
