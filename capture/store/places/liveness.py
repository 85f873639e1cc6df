"""Which process of which machine: who left a lock or an unfinished folder, and whether it still lives."""

import os
import platform
from pathlib import Path

import google_crc32c


def machine() -> str:
    """Tells where a process number means something: host, boot and process namespace, as eight hex digits."""
    parts = [platform.node()]
    for path in ("/proc/sys/kernel/random/boot_id", "/proc/self/ns/pid"):
        try:
            parts.append(os.readlink(path) if path.endswith("ns/pid") else Path(path).read_text().strip())
        except OSError:  # not Linux
            parts.append("")
    return f"{google_crc32c.value(' '.join(parts).encode()):08x}"


def process_start(pid: int) -> int | None:
    """When a process of this machine began, in clock ticks since boot; None if there is no such live process.

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
