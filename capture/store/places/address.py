"""Addresses of object stores: `s3://bucket/prefix`, and the AWS_* variables that say where and as whom.

All are checked before obstore sees them: what cannot be made into a request ends in a panic there.
"""

import os
import re
from urllib.parse import urlsplit

from ....errors import StoreAddressError

_ENDPOINTS = ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL", "AWS_ENDPOINT")  # the first that is set counts
_REGIONS = ("AWS_REGION", "AWS_DEFAULT_REGION")
_SECRETS = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN")


def is_url(text: str) -> bool:
    """Whether a text is, or was meant to be, the URL of an object store."""
    return text[:3].lower() == "s3:"


def split_url(url: str) -> tuple[str, str]:
    """Returns bucket and prefix of a URL; an empty prefix is the bucket itself.

    Raises:
        StoreAddressError: it is none, or names what no object store could find again.
    """
    if not url.lower().startswith("s3://"):
        raise StoreAddressError(
            f"{url} is not s3://bucket/prefix: give two slashes, and text, as a pathlib.Path drops one"
        )
    bucket, _, prefix = url[5:].partition("/")
    if not bucket:
        raise StoreAddressError(f"{url} names no bucket: give s3://bucket/prefix")
    if not re.fullmatch(r"[A-Za-z0-9][\w.-]*", bucket, re.ASCII):
        raise StoreAddressError(
            f"{url}: {bucket!r} is no name of a bucket: it has letters, digits, dots, dashes and underscores"
        )
    parts = prefix.strip("/").split("/") if prefix.strip("/") else []
    if any(part in ("", ".", "..") for part in parts) or not prefix.isprintable():
        raise StoreAddressError(
            f"{url!r}: a prefix has no empty part, no . or .. as a part and no control characters"
        )
    return bucket, "/".join(parts)


def endpoint() -> str | None:
    """Returns the endpoint that the environment names; None for that of AWS.

    Raises:
        StoreAddressError: a variable holds what cannot be one, or cannot be a region or a key.
    """
    for name in _REGIONS:
        if (region := os.environ.get(name)) is not None and not re.fullmatch(
            r"[a-z0-9][\w-]*", region, re.ASCII | re.IGNORECASE
        ):
            raise StoreAddressError(
                f"{name} is {region!r}, which is no region: give one such as us-east-1, or unset it"
            )
    for name in _SECRETS:
        value = os.environ.get(name, "")
        if not (value.isascii() and value.isprintable()) or " " in value:
            raise StoreAddressError(
                f"{name} holds a space, a line break or another character that no key has: set it anew"
            )
    set_ones = [name for name in _ENDPOINTS if name in os.environ]
    for name in set_ones:
        if reason := _why_no_endpoint(os.environ[name]):
            raise StoreAddressError(
                f"{name} is {os.environ[name]!r}, {reason}: give one such as http://host:9000, or unset it"
            )
    return os.environ[set_ones[0]] if set_ones else None


def _why_no_endpoint(value: str) -> str | None:
    try:
        parts = urlsplit(value)
        port = parts.port
    except ValueError:
        return "whose host or port cannot be read"
    if parts.scheme not in ("http", "https"):
        return "which begins with neither http:// nor https://"
    if not parts.hostname or port == 0:
        return "which names no host and port that can be called"
    if not value.isascii() or not value.isprintable() or re.search(r"[\s<>\"{}|\\^`?#]", value):
        return "which has characters that no address has"
    return None
