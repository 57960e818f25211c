"""A run goes on with another number of processes: what of the state of each the new ones take."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from fastadv.algorithms.contract import KeepsPlaces
from fastadv.algorithms.plan import Plan


def taken_over(
    plan: Plan, states: Sequence[Mapping[str, Tensor]], rank: int, world: int
) -> tuple[dict[str, Tensor], list[str]]:
    """The state with which process ``rank`` of ``world`` goes on, from the rank-local ``states`` of
    the processes of a run of ``plan``, and a sentence about each that is not what it was.

    Rows that belong to places in the batch are divided anew, as the batch is. Of anything else
    all take that of the first process.
    """
    if len(states) == world:
        return dict(states[rank]), []
    parts = plan.parts.values()
    places = {n for part in parts if isinstance(part, KeepsPlaces) for n in part.places_in_batch}
    found: dict[str, Tensor] = {}
    told: list[str] = []
    for name, first in states[0].items():
        if name in places:
            rows = torch.cat([state[name] for state in states])
            found[name] = rows[len(rows) * rank // world : len(rows) * (rank + 1) // world]
            continue
        found[name] = first
        if len(states) > 1:
            told.append(
                f"each of the {len(states)} processes of this run kept its own "
                f"{name.replace('_', ' ')}: all {world} go on with that of the first."
            )
    return found, told
