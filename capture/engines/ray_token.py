"""The token by which processes of a Ray cluster know one another: found, made, and tried before Ray is.

Ray itself asks a cluster that refuses it for 20 seconds, and writes to a home that may not be writable. It
takes the token from RAY_AUTH_TOKEN, from the file that RAY_AUTH_TOKEN_PATH names, or from ~/.ray/auth_token.
"""

import os
import secrets
from pathlib import Path

from ...errors import ClusterError

CALL_S = 10.0
ADVICE = (
    "set RAY_AUTH_MODE=token, and RAY_AUTH_TOKEN to the cluster's token, or RAY_AUTH_TOKEN_PATH to a file "
    "that holds it, which is ~/.ray/auth_token otherwise"
)


def give_token() -> None:
    """Gives a cluster of our own a token where Ray would write one to ~/.ray, which may not be writable.

    It is in the environment of this process from then on, as Ray remembers the first one that it reads.

    Raises:
        ClusterError: a token is named, and is none.
    """
    if os.environ.get("RAY_AUTH_MODE", "token").lower() == "token" and _find_token() is None:
        os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)


def asks_for_token(address: str) -> bool:
    """Whether a cluster takes no calls without the token that we have.

    Raises:
        ClusterError: it takes none with it either, or there is none.
    """
    if not _is_refused(address, None):
        return False
    is_off = os.environ.get("RAY_AUTH_MODE", "token").lower() != "token"
    found = None if is_off else _find_token()
    if found is not None and not _is_refused(address, found[1]):
        return True
    why = "RAY_AUTH_MODE is not token" if is_off else "none is set here"
    why = why if found is None else f"that of {found[0]} is another"
    raise ClusterError(f"the Ray cluster at {address} asks for its token, and {why}: {ADVICE}")


def _find_token() -> tuple[str, str] | None:
    """Returns where Ray will find a token, and the token; None if there is none."""
    token, path = os.environ.get("RAY_AUTH_TOKEN", ""), os.environ.get("RAY_AUTH_TOKEN_PATH")
    place = "RAY_AUTH_TOKEN"
    if not token:
        place = f"RAY_AUTH_TOKEN_PATH ({path})" if path else "~/.ray/auth_token"
        try:
            token = Path(path or Path.home() / ".ray" / "auth_token").read_text().strip()
        except (OSError, RuntimeError, ValueError) as error:  # no home, or no text
            if path:
                raise ClusterError(f"{place} names no file that can be read ({error}): {ADVICE}") from error
        if path and not token:
            raise ClusterError(f"{place} names an empty file: {ADVICE}")
    token = token.strip()
    if not (token.isascii() and token.isprintable()) or " " in token:
        raise ClusterError(f"{place} holds a space, a line break or another character that no token has")
    return (place, token) if token else None


def _is_refused(address: str, token: str | None) -> bool:
    """Whether a cluster refuses calls that bear this token, or none if that is None."""
    import grpc  # which Ray brings

    sent = (("authorization", f"Bearer {token}"),) if token else ()
    with grpc.insecure_channel(address) as channel:
        try:
            channel.unary_unary("/ray.rpc.NodeInfoGcsService/GetClusterId")(b"", CALL_S, sent)
        except grpc.RpcError as error:  # what else may be wrong Ray explains better
            return isinstance(error, grpc.Call) and error.code() == grpc.StatusCode.UNAUTHENTICATED
    return False
