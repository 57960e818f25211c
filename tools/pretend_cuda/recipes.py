"""Every recipe in eager and captured mode, without compiling: its launches and its graphs.

PreActResNet-18 at width 8 in bf16 autocast. In captured mode a recipe is recorded, replayed twice
while synchronising is an error, recorded again for a short last batch, and replayed at the first
size.
"""

from __future__ import annotations

import argparse
import json
import warnings
from pathlib import Path
from typing import Any

import forked
import numbers_off
import torch
from counts import Counts, kinds

from fastadv.algorithms.recipes.table import METHODS
from fastadv.benchmark.ours import make_step
from fastadv.benchmark.setting import BenchBatch, Setting
from fastadv.benchmark.specs import Spec
from fastadv.engine.cuda_graph import NotReplayable
from fastadv.training.captured import CapturedUpdate
from fastadv.training.training_step import Step

SETTING = Setting(width=8, batch_size=16, device="cuda")
SHORT = 10
STEPS = 100  # of the run: too few for compiling
LIMIT = 900.0
# Words of the warnings by which a step reports that it is not replayed as a graph.
GIVEN_UP = ("one by one", "operation by operation", "runs as written")


def main() -> None:
    """Write the results of all recipes, or of those given, to a JSON file."""
    given = arguments(__doc__)
    numbers_off.switch_off()
    found = forked.each(given.names or list(METHODS), recipe, given.kept, given.digest, LIMIT)
    given.out.write_text(json.dumps(found, indent=1) + "\n")


def arguments(about: str | None) -> argparse.Namespace:
    """The arguments that ``run.py`` passes to a script over all recipes."""
    parser = argparse.ArgumentParser(description=(about or "").splitlines()[0])
    parser.add_argument("names", nargs="*", help="recipes; all if none is given")
    parser.add_argument("--out", type=Path, required=True, help="JSON of all results")
    parser.add_argument(
        "--kept", type=Path, required=True, help="results of single jobs, written at once"
    )
    parser.add_argument("--digest", default="", help="digest of the files that results belong to")
    return parser.parse_args()


def recipe(name: str) -> dict[str, Any]:
    """Launches of an eager step; nodes of the graphs and launches of a replayed step."""
    counts = Counts()
    full, short = SETTING.batches(1, channels_last=True)[0], _short()
    eager = make_step(SETTING, Spec(name), "bf16", "eager", STEPS)
    for _ in range(3):
        counts.reset()
        call(eager, full)
    found: dict[str, Any] = {
        "eager step": {"launches": counts.launches(), "kinds": kinds(counts.census())}
    }
    del eager
    captured = make_step(SETTING, Spec(name), "bf16", "captured", STEPS)
    try:
        with nothing_given_up():
            counts.reset()
            for _ in range(3):  # recorded; the optimizer from the second or third call on
                call(captured, full)
            found["graphs"] = counts.graphs()
            found["replayed step"] = _replayed(captured, full, counts)
            counts.reset()
            call(captured, short)
            call(captured, short)
            found["graphs of a short batch"] = counts.graphs()
            _replayed(captured, short, counts)
            _replayed(captured, full, counts)
    except NotReplayable as error:
        return {**found, "refused": str(error)}
    passes = captured.internals.passes
    if not isinstance(passes, CapturedUpdate) or passes.recorded != 2:
        raise RuntimeError(f"{name} was not recorded once for each batch size")
    return found


def _short() -> BenchBatch:
    """A last batch with fewer images."""
    batch = SETTING.batches(1, channels_last=True)[0]
    x = batch.x[:SHORT].clone(memory_format=torch.channels_last)
    return BenchBatch(x, batch.y[:SHORT].clone(), batch.index[:SHORT].clone())


def call(step: Step, batch: BenchBatch) -> None:
    """One call of ``step``, with a second view for the methods that compare two."""
    step(batch.x, batch.y, batch.index, second=batch.x.flip(-1))


def _replayed(step: Step, batch: BenchBatch, counts: Counts) -> dict[str, Any]:
    """The launches of a replayed call; two calls must be equal, record nothing, not synchronise."""
    second = batch.x.flip(-1)
    found = []
    torch.cuda.set_sync_debug_mode("error")
    try:
        # A batch is checked straight into the inputs of the recording that was replayed last, and
        # copied once if it belongs to another one.
        step(batch.x, batch.y, batch.index, second=second)
        for _ in range(2):
            counts.reset()
            step(batch.x, batch.y, batch.index, second=second)
            found.append({"launches": counts.launches(), "kinds": kinds(counts.census())})
            if counts.graphs():
                raise RuntimeError("a replayed step has recorded a graph")
    finally:
        torch.cuda.set_sync_debug_mode("default")
    if found[0] != found[1]:
        raise RuntimeError(f"two replayed steps differ: {found[0]} and {found[1]}")
    return found[0]


class nothing_given_up(warnings.catch_warnings):
    """Context in which a warning that operations are launched one by one is an error."""

    def __enter__(self) -> None:
        super().__enter__()
        for words in GIVEN_UP:
            warnings.filterwarnings("error", message=f"(?s).*{words}")


if __name__ == "__main__":
    main()
