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
# The words of a templated kernel's name that say what it computes, and those that do not.
TELLING = re.compile(
    r"\b\w*(?:Functor|Ops|functor|_kernel_cuda|kernel_impl|_scalar|scalar_kernel|NormType)\w*"
)
WRAPPERS = re.compile(r"gpu_kernel_impl\w*|(?:Unary|Binary|AUnary|BUnary|UnaryOp)Functor|NormType")
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
        return [
            {"nodes": nodes, "kinds": kinds(census)} for census, nodes in self.graphs_by_kernel()
        ]

    def graphs_by_kernel(self) -> list[tuple[dict[str, int], int]]:
        """Each graph captured since the reset: its nodes by kernel name, and their number."""
        found = json.loads(self._library.pretend_cuda_graphs())
        return [(census, nodes) for census, nodes in found]


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


def kernels(census: Mapping[str, int]) -> dict[str, int]:
    """Launches by short name, the most frequent first. Kernels of Inductor's are counted by
    kind."""
    found: Counter[str] = Counter()
    for name, count in census.items():
        found[short(name)] += count
    return dict(sorted(found.items(), key=lambda pair: (-pair[1], pair[0])))


def short(name: str) -> str:
    """The kernel ``name`` without namespaces, types and arguments, with the words that say what it
    computes: "reduce_kernel MeanOps"."""
    if TRITON.match(name):
        return kind(name)
    bare = re.sub(r"\(anonymous namespace\)::|\w+::|^void ", "", name)
    head = re.split(r"[<(]", bare, maxsplit=1)[0].strip()
    words = [word for word in TELLING.findall(bare[len(head) :]) if not WRAPPERS.fullmatch(word)]
    return " ".join(dict.fromkeys([head, *words[:2]]))
