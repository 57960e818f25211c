"""What Inductor generates for each region, with stubs in place of its kernels.

No kernel of Inductor's is compiled: a stub launches a kernel that does nothing under its name, so
that a capture holds the same nodes. fastadv's own Triton kernels are compiled and launched.

A launch is one node of Inductor's scheduler. Its bytes are those of the buffers it reads and
writes, each counted once (``get_read_write_buffers_sizes``), which is the minimum a kernel can
move; a reduction that reads its input twice moves more. The bytes of fastadv's own kernels are
those of the tensors that each launch takes, counted once, and twice where it reads and writes the
same (``fastadv.benchmark.launches.argument_bytes``); a kernel that gathers rows of a store counts
the whole store. Convolutions, matrix products and custom operators are counted by name; the bytes
of the first two are not counted.
"""

from __future__ import annotations

import ctypes
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import torch

from fastadv.benchmark.launches import watched_launches
from fastadv.engine.compiled import Runner


@dataclass
class Generated:
    """The regions that a process has compiled since ``watch``."""

    graphs: list[dict[str, Any]] = field(default_factory=list)
    own: dict[str, dict[str, list[int]]] = field(default_factory=dict)
    recorded: Counter[str] = field(default_factory=Counter)  # runs while a graph was captured

    def passes(self) -> list[dict[str, Any]]:
        """A row for each graph: the region's name ("pass"), Inductor's launches, how many of them
        are "tiny", their "megabytes"; then the launches and bytes of fastadv's own kernels."""
        return [graph | _own(self.own.get(graph["pass"], {})) for graph in self.graphs]

    def recorded_passes(self) -> list[dict[str, Any]]:
        """The same rows, with how often ("runs") each region was captured."""
        return [each | {"runs": self.recorded[each["pass"]]} for each in self.passes()]


def watch(tiny: float) -> Generated:
    """Replace Inductor's kernels by stubs in this process. A launch that moves fewer than ``tiny``
    bytes is counted as tiny."""
    # Importing these starts CUDA, which does not survive a fork.
    import compiling
    import torch._functorch.config as functorch
    from torch._inductor import async_compile, config, graph

    compiling.fold_on_the_cpu()
    config.fx_graph_cache = False
    functorch.enable_autograd_cache = False
    functorch.bundled_autograd_cache = False
    async_compile.AsyncCompile.triton = lambda self, name, *given, **options: _Stub(name)  # type: ignore[method-assign]
    async_compile.AsyncCompile.wait = lambda *given: None  # type: ignore[method-assign]
    found = Generated()
    region = [""]
    run, generate = Runner.__call__, graph.GraphLowering.codegen

    def named(self: Runner, called: Any, *inputs: Any) -> Any:
        region[0] = called.__name__.lstrip("_")
        found.recorded[region[0]] += torch.cuda.is_current_stream_capturing()
        with watched_launches(only_recorded=False) as own:
            result = run(self, called, *inputs)
        found.own[region[0]] = own
        return result

    def counted(self: Any) -> Any:
        made = generate(self)
        found.graphs.append({"pass": region[0], **_counts(self.scheduler.nodes, tiny)})
        return made

    Runner.__call__ = named  # type: ignore[method-assign]
    graph.GraphLowering.codegen = counted  # type: ignore[method-assign]
    return found


class _Size(ctypes.Structure):
    _fields_ = (("x", ctypes.c_uint), ("y", ctypes.c_uint), ("z", ctypes.c_uint))


_ONE = _Size(1, 1, 1)


class _Stub:
    """In place of a compiled kernel: launches nothing under its name."""

    def __init__(self, name: str) -> None:
        self._library = ctypes.CDLL(None)
        self._place = ctypes.create_string_buffer(1)  # its address identifies the kernel
        register = getattr(self._library, "__cudaRegisterFunction")
        register(
            None, self._place, None, f"triton:{name}".encode(), 0, None, None, None, None, None
        )

    def run(self, *given: Any, stream: int, **options: Any) -> None:
        error = self._library.cudaLaunchKernel(
            self._place, _ONE, _ONE, None, ctypes.c_size_t(0), ctypes.c_void_p(stream)
        )
        if error:
            raise RuntimeError(f"the launch of a stub failed with error {error}")

    def __getattr__(self, name: str) -> Any:
        return lambda *given, **options: None


def _counts(nodes: list[Any], tiny: float) -> dict[str, Any]:
    """Launches and bytes of Inductor's own kernels, and the number of calls of other operators."""
    own = [node for node in nodes if not node.is_extern() and not _is_nothing(node)]
    sizes = [node.get_read_write_buffers_sizes() for node in own]
    others = Counter(_called(node) for node in nodes if node.is_extern() and not _is_part(node))
    return {
        "launches": len(own),
        "tiny": sum(size < tiny for size in sizes),
        "megabytes": round(sum(sizes) / 1e6),
        "others": dict(sorted(others.items())),
    }


def _own(launched: dict[str, list[int]]) -> dict[str, Any]:
    """Launches and bytes of fastadv's kernels in one run of a region."""
    sizes = [size for entries in launched.values() for size in entries]
    return {"own_launches": len(sizes), "own_megabytes": round(sum(sizes) / 1e6)}


def _is_nothing(node: Any) -> bool:
    from torch._inductor.scheduler import NopKernelSchedulerNode

    return isinstance(node, NopKernelSchedulerNode)


def _is_part(node: Any) -> bool:
    """True if the node is one output of a call with several outputs, not a call."""
    return type(node.node).__name__ == "MultiOutput"


def _called(node: Any) -> str:
    operation = node.node
    overload = getattr(operation, "op_overload", None)
    if overload is not None:
        return str(overload)
    return str(getattr(operation, "python_kernel_name", None) or type(operation).__name__)
