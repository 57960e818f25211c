"""Settings whose value is allowed and leaves a part of the run without effect: said once."""

from __future__ import annotations

from collections.abc import Iterator

from fastadv.algorithms.slots import NONE
from fastadv.run.config import RunConfig


def without_effect(config: RunConfig) -> Iterator[str]:
    """A sentence for each such setting of a run."""
    if config.lr == 0:
        yield "lr 0: no update changes a weight; only running statistics of BatchNorm move."
    if config.eps == 0:
        attacks = config.plan.slots["adversary"] != NONE
        trained = f"{config.method} trains on clean images and " if attacks else ""
        yield f"eps 0: an attack moves no image, so {trained}every accuracy is the clean one."
