"""When a process began, and on which start of this computer: what tells it from a later one with
the same number. Linux says so; elsewhere nothing is known."""

from __future__ import annotations

import os
import time
from pathlib import Path

_ENDED = ("Z", "X")  # states of a process that waits for its parent to take notice


def boot() -> str:
    """Which start of this computer it is; "" if it does not say."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    except (OSError, ValueError):
        return ""


def began(pid: int) -> str | None:
    """When the process ``pid`` began, in ticks since the start of this computer; None if it has
    ended, or if the system does not say."""
    try:
        # A name may hold brackets, spaces and any byte.
        stat = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
        fields = stat.rpartition(")")[2].split()
        return None if fields[0] in _ENDED else fields[19]
    except (OSError, IndexError):
        return None


def began_at(pid: int) -> float | None:
    """The same as a time of ``time.time``."""
    ticks = began(pid)
    try:
        up = float(Path("/proc/uptime").read_text(encoding="ascii").split()[0])
        return None if ticks is None else time.time() - up + int(ticks) / os.sysconf("SC_CLK_TCK")
    except (AttributeError, OSError, ValueError, IndexError):
        return None
