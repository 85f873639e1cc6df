"""The common part of drivers' locks on disks and in object stores: times, and errors of drivers."""

import json
from typing import Any

from ....errors import StoreLockedError

HEARTBEAT_S = 10.0
STALE_S = 60.0


def locked(store: str, holder: dict[str, Any]) -> StoreLockedError:
    """Returns the error for a second driver, from what the lock says of the first: host, pid, silent_s."""
    return StoreLockedError(
        f"{store} is being written by process {holder['pid']} on {holder['host']} "
        f"(last sign of life {holder['silent_s']:.0f} s ago): wait for it or stop it; "
        f"its lock lapses after {STALE_S:.0f} s without a sign of life"
    )


def parse(content: bytes) -> dict[str, Any] | None:
    """Returns what a lock says of its holder; None if it does not read as a lock."""
    try:
        holder = json.loads(content)
    except (ValueError, RecursionError):
        return None
    kinds = {"host": str, "pid": int, "machine": str, "process_start": int | None}
    is_sound = isinstance(holder, dict) and all(
        name in holder and isinstance(holder[name], kind) for name, kind in kinds.items()
    )
    return holder if is_sound else None


def is_fresh(silent_s: float) -> bool:
    """Whether a sign of life counts; one from the future does not, as its clock was another then."""
    return abs(silent_s) < STALE_S


def lost(store: str) -> StoreLockedError:
    """Returns the error for a driver whose lock another took over."""
    return StoreLockedError(
        f"another run has taken {store} over, as this one gave no sign of life for too long; it stops, and "
        "what it committed stays"
    )
