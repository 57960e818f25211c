"""The counters of the pretended runtime: launches by kernel, and nodes of captured graphs."""

from __future__ import annotations

import ctypes
import json
import re
from collections import Counter
from collections.abc import Mapping
from typing import Any

# The first pattern that matches a name gives its kind; a Triton kernel is its own kind.
KINDS = (
    ("message", r"(?i)nccl"),
    ("convolution", r"(?i)cudnn|conv"),
    ("matrix product", r"(?i)cublas|gemm|matmul"),
    ("batch norm", r"(?i)batch_?norm|bn_"),
    ("clearing", r"(?i)memset|semaphore"),
    ("copy", r"(?i)memcpy|direct_copy|bfloat16_copy|float16_copy|copy_kernel"),
    ("foreach", r"multi_tensor_apply"),
    ("reduction", r"(?i)reduce|scan|sort|topk|softmax|norm"),
    ("random", r"(?i)distribution|philox|random"),
    ("solver", r"(?i)cusolver|syevd|gesvd"),
    ("elementwise", r"(?i)elementwise|index|gather|scatter|fill|Cat|pool|where"),
)
TRITON = re.compile(r"^(?:triton:)?(?:triton_(poi|red|per|for|tem)_\w+|(_\w+_kernel))$")
INDUCTOR = {"poi": "pointwise", "red": "reduction", "per": "persistent reduction", "for": "foreach"}


class Counts:
    """The library's counters of this process."""

    def __init__(self) -> None:
        self._library = ctypes.CDLL(None)
        self._library.pretend_cuda_launches.restype = ctypes.c_long
        for name in ("census", "graphs"):
            getattr(self._library, f"pretend_cuda_{name}").restype = ctypes.c_char_p

    def reset(self) -> None:
        """Set all counters to zero, also those of graphs."""
        self._library.pretend_cuda_reset()

    def launches(self) -> int:
        """Kernels, copies, memsets and graphs launched since the reset."""
        return int(self._library.pretend_cuda_launches())

    def census(self) -> dict[str, int]:
        """The same launches by kernel name."""
        found: dict[str, int] = json.loads(self._library.pretend_cuda_census())
        return found

    def graphs(self) -> list[dict[str, Any]]:
        """Each graph captured since the reset: its number of nodes, and the number of each kind."""
        found = json.loads(self._library.pretend_cuda_graphs())
        return [{"nodes": nodes, "kinds": kinds(census)} for census, nodes in found]


def kinds(census: Mapping[str, int]) -> dict[str, int]:
    """Launches by kind, sorted by name."""
    found: Counter[str] = Counter()
    for name, count in census.items():
        found[kind(name)] += count
    return dict(sorted(found.items()))


def kind(name: str) -> str:
    """The kind of the kernel ``name``."""
    triton = TRITON.match(name)
    if triton:
        return triton[2] or f"inductor {INDUCTOR.get(triton[1], triton[1])}"
    return next((known for known, pattern in KINDS if re.search(pattern, name)), "other")
