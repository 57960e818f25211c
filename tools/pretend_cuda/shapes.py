"""Every recipe compiled and captured: the graphs that Inductor compiles, and the captured nodes.

PreActResNet-18 at width 8 and batch 8 in bf16 autocast, in a run long enough to compile: Dynamo,
Inductor, Triton and ptxas for sm_90, then the capture. The caches are shared, so that a graph of
several recipes is compiled once; ``shapes`` identifies graphs across recipes.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from typing import Any

import forked
import numbers_off
import torch
from counts import Counts
from recipes import arguments, call, nothing_given_up

from fastadv.algorithms.recipes.table import METHODS
from fastadv.benchmark.ours import LONG_RUN, make_step
from fastadv.benchmark.setting import Setting
from fastadv.benchmark.specs import Spec
from fastadv.engine.cuda_graph import NotReplayable
from fastadv.training.captured import CapturedUpdate

SETTING = Setting(width=8, batch_size=8, device="cuda")
LIMIT = 1800.0


def main() -> None:
    """Write the results of all recipes, or of those given, to a JSON file."""
    given = arguments(__doc__)
    numbers_off.switch_off()
    found = forked.each(given.names or list(METHODS), compiled, given.kept, given.digest, LIMIT)
    given.out.write_text(json.dumps(found, indent=1) + "\n")


def compiled(name: str) -> dict[str, Any]:
    """Digests of the compiled graphs, nodes of the captured graphs, launches of a replayed step."""
    counts, shapes = Counts(), _watched()
    step = make_step(SETTING, Spec(name), "bf16", "captured", LONG_RUN)
    batch = SETTING.batches(1, channels_last=True)[0]
    counts.reset()
    try:
        with nothing_given_up():
            for _ in range(3):
                call(step, batch)
            graphs = counts.graphs()
            counts.reset()
            call(step, batch)
            if counts.graphs():
                raise RuntimeError("a replayed step has recorded a graph")
    except NotReplayable as error:
        return {"shapes": sorted(set(shapes)), "refused": str(error)}
    if (
        not isinstance(step.internals.passes, CapturedUpdate)
        or not step.internals.net.runner.compiles
    ):
        raise RuntimeError(f"{name} is not compiled and captured")
    return {
        "shapes": sorted(set(shapes)),
        "graphs": graphs,
        "replayed step": counts.launches(),
    }


def _watched() -> list[str]:
    """A list that receives a digest of each graph passed to Inductor: of its operations and of the
    shapes, strides and types of its inputs."""
    import compiling  # Inductor's import starts CUDA, which does not survive a fork
    from torch._inductor import compile_fx

    compiling.fold_on_the_cpu()

    found: list[str] = []
    compile_graph = compile_fx.compile_fx

    def noted(model: Any, inputs: Sequence[Any], *more: Any, **options: Any) -> Any:
        found.append(_digest(model, inputs))
        return compile_graph(model, inputs, *more, **options)

    compile_fx.compile_fx = noted  # type: ignore[assignment]
    return found


def _digest(model: torch.fx.GraphModule, inputs: Sequence[Any]) -> str:
    told = [
        (tuple(value.shape), value.stride(), str(value.dtype))
        if isinstance(value, torch.Tensor)
        else repr(value)
        for value in inputs
    ]
    return hashlib.sha256(f"{model.code}{told}".encode()).hexdigest()[:12]


if __name__ == "__main__":
    main()
