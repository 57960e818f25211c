"""The memory of this process and of its machine, in bytes.

Linux says everything. macOS says what a process has taken at most, since its start; Windows says
nothing that Python can read: None.
"""

from __future__ import annotations

import functools
import os
import sys
from pathlib import Path

from fastadv.errors import warn

try:
    import resource
except ImportError:  # Windows
    resource = None  # type: ignore[assignment]

_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")
_MACHINE = Path("/proc/meminfo")
_LIMITS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")
_ASSUMED = 8 << 30


def machine_memory() -> int:
    """Memory of this machine, or the limit of the container this process runs in."""
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


def resident() -> int | None:
    """What this process takes now; None but on Linux."""
    return _stated(_STATUS, "VmRSS")


def peak() -> int | None:
    """What this process has taken at most since its start, or since ``forget_peak``."""
    found = _stated(_STATUS, "VmHWM")
    if found is not None or resource is None:
        return found
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else most * 1024


def forget_peak() -> bool:
    """Let ``peak`` begin again with what is taken now; False where the system cannot."""
    try:
        _CLEAR.write_text("5")
    except OSError:
        return False
    return True


def free() -> int:
    """What this process can still take: what the machine has left, within its container and the
    limit of its addresses (``ulimit -v``)."""
    found = machine_memory() - (resident() or peak() or 0)
    available, addresses = _stated(_MACHINE, "MemAvailable"), _stated(_STATUS, "VmSize")
    if available is not None:
        found = min(found, available)
    limit = _address_limit()
    if limit is not None and addresses is not None:
        found = min(found, limit - addresses)
    return max(found, 0)


def addresses_are_limited() -> bool:
    """True with a limit of addresses (``ulimit -v``)."""
    return _address_limit() is not None


def _address_limit() -> int | None:
    if resource is None:
        return None
    limit, _ = resource.getrlimit(resource.RLIMIT_AS)
    return None if limit == resource.RLIM_INFINITY else limit


def _stated(file: Path, name: str) -> int | None:
    """The number of kB after ``name`` in ``file``, one of /proc."""
    try:
        lines = file.read_text().splitlines()
    except OSError:
        return None
    for line in lines:
        if line.startswith(f"{name}:"):
            return 1024 * int(line.split()[1])
    return None
