"""Identifies processes across machines: who left a lock or an unfinished folder, and whether it lives."""

import os
import platform
from pathlib import Path

import google_crc32c


def machine() -> str:
    """Returns a hash of host, boot and process namespace, inside which a process number means something."""
    parts = [platform.node()]
    for path in ("/proc/sys/kernel/random/boot_id", "/proc/self/ns/pid"):
        try:
            parts.append(os.readlink(path) if path.endswith("ns/pid") else Path(path).read_text().strip())
        except OSError:  # not Linux
            parts.append("")
    return f"{google_crc32c.value(' '.join(parts).encode()):08x}"


def process_start(pid: int) -> int | None:
    """Returns the start of a process of this machine, in clock ticks since boot; None if no such process
    lives.

    Number and start together name a process for good, the number alone is used again. Where /proc is missing
    the start is 0 for any live process.
    """
    if not Path("/proc/self/stat").exists():
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return None
        except PermissionError:
            pass
        return 0
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return None
    fields = text.rpartition(")")[2].split()  # the name in parentheses may hold anything
    if fields[0] in "ZX":  # killed, and only not yet collected by its parent
        return None
    return int(fields[19])
