"""The memory that is available for a data set."""

from __future__ import annotations

import functools
import os
from pathlib import Path

from fastadv.errors import warn

_LIMITS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")
_ASSUMED = 8 << 30  # bytes


def machine_memory() -> int:
    """Memory of this machine in bytes, or the limit of the container this process runs in."""
    try:
        found = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):  # Windows
        found = _assumed()
    for place in _LIMITS:
        try:
            found = min(found, int(Path(place).read_text()))
        except (OSError, ValueError):  # no limit file, or "max"
            continue
    return found


@functools.cache  # said once
def _assumed() -> int:
    warn(f"This system does not say how much memory it has: {_ASSUMED >> 30} GB are assumed.")
    return _ASSUMED
