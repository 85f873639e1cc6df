"""The common part of drivers' locks on disks and in object stores: times, and errors of drivers."""

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


def lost(store: str) -> StoreLockedError:
    """Returns the error for a driver whose lock another took over."""
    return StoreLockedError(
        f"another run has taken {store} over, as this one gave no sign of life for too long; it stops, and "
        "what it committed stays"
    )
