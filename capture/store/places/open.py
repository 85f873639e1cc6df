"""From a path or URL to the place that it means."""

from pathlib import Path

from ....errors import StoreError
from .directory import LocalPlace
from .objects import ObjectPlace


def open_place(path: str | Path) -> LocalPlace | ObjectPlace:
    """A local directory, or `s3://bucket/prefix`; nothing need be there yet.

    Raises:
        StoreError: another kind of URL; obstore, which reaches S3, is not installed.
    """
    text = str(path)
    if text.startswith("s3://"):
        return ObjectPlace(text)
    if isinstance(path, Path) and text.startswith("s3:/"):
        raise StoreError(f"{text} lost a slash in a pathlib.Path: give s3://… as text")
    if "://" in text:
        raise StoreError(f"{text} cannot hold a store: give a local directory or s3://bucket/prefix")
    return LocalPlace(Path(path))
