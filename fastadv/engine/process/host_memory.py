"""On a CPU, memory that was freed stays with the process.

A step allocates and frees every activation of its passes. By default glibc hands large freed blocks
back to the kernel, which clears each page again at its next first use: thousands of page faults a
step. Kept, the next pass finds them. The process stays as large as its largest step was.
"""

from __future__ import annotations

import ctypes
import os
import platform
from functools import cache

# Of <malloc.h>.
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
NEVER = 2**31 - 1
# Blocks below these are kept; older glibc refuses the first.
LARGEST = (2**30, 2**25)
# A user who sets one of these has made the choice already.
SETTINGS = ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "GLIBC_TUNABLES")


@cache
def keep_freed_memory() -> bool:
    """Tell glibc so, once per process; False where there is no glibc or the environment decides."""
    if platform.libc_ver()[0] != "glibc" or any(name in os.environ for name in SETTINGS):
        return False
    mallopt = ctypes.CDLL(None).mallopt
    kept = any(mallopt(M_MMAP_THRESHOLD, size) for size in LARGEST)
    return kept and bool(mallopt(M_TRIM_THRESHOLD, NEVER))
