"""Keeps freed memory in the process, for steps on a CPU.

A step allocates and frees every activation of its passes. By default glibc returns large freed
blocks to the kernel, which clears each page at its next first use: thousands of page faults per
step. With these settings the next pass reuses the blocks. The process stays as large as in its
largest step.
"""

from __future__ import annotations

import ctypes
import os
import platform
from functools import cache

# From <malloc.h>.
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
NEVER = 2**31 - 1
# Blocks below this size are kept; the second value is for older glibc, which refuses the first.
LARGEST = (2**30, 2**25)
# If one of these is set in the environment, the user has made the choice.
SETTINGS = ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "GLIBC_TUNABLES")


@cache
def keep_freed_memory() -> bool:
    """Set glibc to keep freed memory, once per process; False without glibc, or if the environment
    has a setting."""
    if platform.libc_ver()[0] != "glibc" or any(name in os.environ for name in SETTINGS):
        return False
    mallopt = ctypes.CDLL(None).mallopt
    kept = any(mallopt(M_MMAP_THRESHOLD, size) for size in LARGEST)
    return kept and bool(mallopt(M_TRIM_THRESHOLD, NEVER))
