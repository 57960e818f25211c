"""Bytes and launches of each compiled pass, as Inductor's scheduler counts them; no kernel is
compiled.

A launch is one node of the scheduler. Its bytes are those of the buffers it reads and writes, each
counted once (``get_read_write_buffers_sizes``), which is the minimum a kernel can move; a reduction
that reads its input twice (a cooperative one: statistics, then the result) moves more, unless the
second reading finds it in the cache. Convolutions, matrix products and custom operators are counted
by name, without bytes.
"""

from __future__ import annotations

import argparse
import json
from collections import Counter
from pathlib import Path
from typing import Any

import forked
import numbers_off
from recipes import call

from fastadv.benchmark.ours import LONG_RUN, make_step
from fastadv.benchmark.setting import Setting
from fastadv.benchmark.specs import Spec
from fastadv.benchmark.variants import NONE, variant
from fastadv.engine.compiled import Runner

# Methods, batch sizes and variants, for PreActResNet-18 at its published width.
WORK = (
    "pgd at 512",
    "pgd:attack_bn=eval at 512",
    "apart at 512",
    "fast at 512",
    "trades at 512",
    "pgd at 128",
    "pgd at 128 with cooperative",
    "pgd at 512 with padded",
)
TINY = 2e6  # bytes at 512 images; a launch below this takes no longer than its start
LIMIT = 1800.0


def main() -> None:
    """Write the launches and bytes of each pass in ``WORK`` to a JSON file."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("names", nargs="*", help="such as 'pgd at 512'; all if none is given")
    parser.add_argument("--out", type=Path, required=True, help="JSON of all results")
    parser.add_argument(
        "--kept", type=Path, required=True, help="results of single jobs, written at once"
    )
    parser.add_argument("--digest", default="", help="digest of the files that results belong to")
    given = parser.parse_args()
    numbers_off.switch_off()
    found = forked.each(given.names or list(WORK), generated, given.kept, given.digest, LIMIT)
    given.out.write_text(json.dumps(found, indent=1) + "\n")


def generated(name: str) -> dict[str, Any]:
    """The passes of one compiled step; ``name`` is METHOD at BATCH_SIZE, or METHOD at BATCH_SIZE
    with VARIANT (``fastadv/benchmark/variants.py``)."""
    method, rest = name.split(" at ")
    size, _, chosen = rest.partition(" with ")
    setting = Setting(batch_size=int(size), device="cuda")
    found = _watched(TINY * setting.batch_size / 512)
    with variant(chosen or NONE):
        step = make_step(setting, Spec.parse(method), "bf16", "compiled", LONG_RUN)
        call(step, setting.batches(1, channels_last=True)[0])
    return {"passes": found}


def _watched(tiny: float) -> list[dict[str, Any]]:
    """A list that receives each generated graph with its region's name; kernels are stubs."""
    # Importing these starts CUDA, which does not survive a fork.
    import compiling
    import torch._functorch.config as functorch
    from torch._inductor import async_compile, config, graph

    compiling.fold_on_the_cpu()
    config.fx_graph_cache = False
    functorch.enable_autograd_cache = False
    functorch.bundled_autograd_cache = False
    async_compile.AsyncCompile.triton = lambda *given, **options: _Kernel()  # type: ignore[method-assign]
    async_compile.AsyncCompile.wait = lambda *given: None  # type: ignore[method-assign]
    found: list[dict[str, Any]] = []
    region = [""]
    run, generate = Runner.__call__, graph.GraphLowering.codegen

    def named(self: Runner, called: Any, *inputs: Any) -> Any:
        region[0] = called.__name__.lstrip("_")
        return run(self, called, *inputs)

    def counted(self: Any) -> Any:
        made = generate(self)
        found.append({"pass": region[0], **_counts(self.scheduler.nodes, tiny)})
        return made

    Runner.__call__ = named  # type: ignore[method-assign]
    graph.GraphLowering.codegen = counted  # type: ignore[method-assign]
    return found


class _Kernel:
    """A stub of a compiled kernel."""

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


if __name__ == "__main__":
    main()
