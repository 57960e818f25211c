"""Every launch and byte of whole steps of PreActResNet-18 at its published width.

In bf16 and channels_last, eager, and captured with compiled passes, whose kernels are stubs
(``inductor_stubs.py``). Counted are an eager step, the nodes of each graph of a captured step, the
launches of its replay, and in a captured step the bytes outside cuDNN and cuBLAS that the passes
move. "own kernels" are fastadv's Triton kernels.
"""

from __future__ import annotations

import json
from typing import Any

import forked
import inductor_stubs
import numbers_off
from counts import Counts, kernels, kinds
from generated import TINY
from recipes import arguments, nothing_given_up

from fastadv.benchmark.launches import watched_launches
from fastadv.benchmark.ours import LONG_RUN, make_step
from fastadv.benchmark.setting import BenchBatch, Setting
from fastadv.benchmark.specs import Spec
from fastadv.training.captured import CapturedUpdate
from fastadv.training.training_step import Step

# Methods and batch sizes; each in both modes, with PyTorch's BatchNorm and with the own kernels.
WORK = (("pgd", 512), ("pgd", 128), ("apart", 512))
MODES = ("eager", "captured")
FUSED = ":fused_norm=on"
NORM_KERNEL = "_statistics_kernel"
GRAPHS = ("passes", "end", "optimizer")  # in the order in which they are recorded
LIMIT = 1800.0


def main() -> None:
    """Write the results of all steps, or of those given, to a JSON file."""
    given = arguments(__doc__)
    numbers_off.switch_off()
    found = forked.each(given.names or names(), counted, given.kept, given.digest, LIMIT)
    given.out.write_text(json.dumps(found, indent=1) + "\n")


def names() -> list[str]:
    """METHOD at BATCH_SIZE MODE, such as "pgd:fused_norm=on at 512 eager"."""
    return [
        f"{method}{fused} at {size} {mode}"
        for method, size in WORK
        for mode in MODES
        for fused in ("", FUSED)
    ]


def counted(name: str) -> dict[str, Any]:
    """The launches, nodes and bytes of the step ``name``, one of ``names()``."""
    method, _, size, mode = name.split()
    setting = Setting(batch_size=int(size), device="cuda")
    batch = setting.batches(1, channels_last=True)[0]
    count = {"eager": _eager, "captured": _captured}[mode]
    found = count(setting, Spec.parse(method), batch)
    if (NORM_KERNEL in found["own kernels"]) != (FUSED in name):
        raise RuntimeError(f"{NORM_KERNEL} is launched if and only if the step is named {FUSED}")
    return found


def _eager(setting: Setting, spec: Spec, batch: BenchBatch) -> dict[str, Any]:
    """An eager step; the first two are not counted, since they also create what later ones keep."""
    counts = Counts()
    step = make_step(setting, spec, "bf16", "eager", LONG_RUN)
    for _ in range(2):
        _call(step, batch)
    counts.reset()
    with watched_launches(only_recorded=False) as own:
        _call(step, batch)
    return {"step": _launches(counts), "own kernels": _sizes(own)}


def _captured(setting: Setting, spec: Spec, batch: BenchBatch) -> dict[str, Any]:
    """A captured step, recorded and replayed once."""
    counts = Counts()
    generated = inductor_stubs.watch(TINY * setting.batch_size / 512)
    step = make_step(setting, spec, "bf16", "captured", LONG_RUN)
    counts.reset()
    with nothing_given_up(), watched_launches() as own:
        for _ in range(3):  # recorded; the optimizer from the second or third call on
            _call(step, batch)
    recorded = counts.graphs_by_kernel()
    graphs = {
        part: {"nodes": nodes, "kinds": kinds(census), "kernels": kernels(census)}
        for part, (census, nodes) in zip(GRAPHS, recorded, strict=True)
    }
    counts.reset()
    _call(step, batch)
    replayed = _launches(counts)
    if counts.graphs():
        raise RuntimeError("a replayed step has recorded a graph")
    internals = step.internals
    if not isinstance(internals.passes, CapturedUpdate) or not internals.net.runner.compiles:
        raise RuntimeError("the step is not compiled and captured")
    passes = generated.recorded_passes()
    return {
        "nodes": sum(graph["nodes"] for graph in graphs.values()),
        "graphs": graphs,
        "replayed step": replayed,
        "passes": passes,
        "generated megabytes": sum(each["runs"] * each["megabytes"] for each in passes),
        "own kernels": _sizes(own),
    }


def _call(step: Step, batch: BenchBatch) -> None:
    step(batch.x, batch.y, batch.index)


def _launches(counts: Counts) -> dict[str, Any]:
    census = counts.census()
    return {"launches": counts.launches(), "kinds": kinds(census), "kernels": kernels(census)}


def _sizes(launched: dict[str, list[int]]) -> dict[str, Any]:
    """Launches and megabytes by kernel."""
    return {
        name: {"launches": len(sizes), "megabytes": round(sum(sizes) / 1e6)}
        for name, sizes in sorted(launched.items())
    }


if __name__ == "__main__":
    main()
