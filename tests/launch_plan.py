"""The number of operators that each recording of a recipe launches, against golden numbers.

``python tests/launch_plan.py`` records new numbers; the commit says why they changed.
An operator is not always one kernel. What the kernels are is counted on the pretended CUDA runtime
(``tools/pretend_cuda``), which takes minutes and no part in CI; this is its cheap relative.
"""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

GOLDEN = Path(__file__).parent / "golden" / "launch_plan.json"
# Memory without a launch.
NOTHING = ("empty", "new_empty", "_local_scalar")


def launches(operator: Any) -> bool:
    """True if ``operator`` computes something; views and empty memory do not."""
    name = operator._schema.name.split("::")[1]
    views = any(
        result.alias_info is not None and not result.alias_info.is_write
        for result in operator._schema.returns
    )
    return not views and not name.startswith(NOTHING)


def plan(recordings: Sequence[Any]) -> list[Counter[str]]:
    """Operators by name, for each recording on the pretended GPU."""
    return [
        Counter(str(call[0]) for call in recording.calls if launches(call[0]))
        for recording in recordings
    ]


def assert_known(method: str, recordings: Sequence[Any]) -> None:
    """Raise ``AssertionError`` where a recording launches more or fewer operators than before.

    Other versions of torch take other operators: there is nothing to compare with then.
    """
    found = plan(recordings)
    known = json.loads(GOLDEN.read_text())
    if known["torch"] != _release():
        return
    totals = [counts.total() for counts in found]
    assert totals == known["recipes"].get(method), (
        f"{method} launches {totals} operators in its recordings, which were "
        f"{known['recipes'].get(method)}: where that is meant, run python tests/launch_plan.py and "
        f"say why in the commit. Now they are {[dict(counts.most_common()) for counts in found]}"
    )


def _release() -> str:
    return ".".join(torch.__version__.split(".")[:2])


def main() -> None:
    """Record every recipe and write the numbers."""
    import pretend_gpu as gpu
    from every_recipe import EPOCHS, step_of
    from pretend_steps import call, captured, on_device
    from tiny_staged import staged_model

    from fastadv.algorithms.recipes.table import METHODS
    from fastadv.engine.cuda_graph import NotReplayable

    found = {}
    with gpu.pretend_gpu():
        for method in METHODS:
            step = captured(step_of(method, on_device(staged_model())))
            try:
                for update in range(EPOCHS):
                    call(step, update)
            except NotReplayable:
                continue
            passes: Any = step.internals.passes
            totals = [counts.total() for counts in plan(passes.recorder.recordings)]
            found[method] = totals
    lines = (f"{json.dumps(method)}: {json.dumps(totals)}" for method, totals in found.items())
    recipes = ",\n".join(lines)
    GOLDEN.write_text(f'{{"torch": "{_release()}", "recipes": {{\n{recipes}\n}}}}\n')


if __name__ == "__main__":
    sys.exit(main())
