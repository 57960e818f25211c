"""The state of a step in a checkpoint."""

from __future__ import annotations

from collections.abc import Mapping
from types import NoneType
from typing import Any

from torch import Tensor

from fastadv.algorithms.contract import Part
from fastadv.errors import UserError, brief
from fastadv.training.internals import Internals
from fastadv.training.preparation import Allocated


def state_of(step: Internals) -> dict[str, Any]:
    """Everything that a resumed run needs beside model and optimizer. The tensors are live, not
    copies. Raises ``UserError`` if a gradient waits for an update, which would be lost."""
    if step.updater.waits:
        raise UserError(
            "A gradient waits for an update (update=False) and would be lost in this state: save "
            "after a call that updates."
        )
    step.changes.follow(prepared=step.allocated)
    preparation, momenta = step.preparation, step.net.bn_momenta
    allocated = preparation.allocated
    return {
        "method": step.plan.method,
        "slots": dict(step.plan.slots),
        "calls": step.clock.calls,
        "epoch": step.clock.named_epoch,
        "offset": step.offset,
        "parts": {slot: dict(part.state) for slot, part in step.plan.parts.items()},
        "updater": step.updater.state_dict(),
        "allocated": [] if allocated is None else allocated.saved(),
        "one_pass_stands": momenta.stands if preparation.prepared else momenta.known_to_stand,
    }


def take_over(
    step: Internals, state: dict[str, Any], rank_local_state: Mapping[str, Tensor] | None
) -> None:
    """Load a state that ``state_of`` returned for the same recipe; also possible before the first
    call. ``rank_local_state`` is what ``Step.rank_local_state`` returned in this process. Raises
    ``UserError`` for a state of other parts, another model or another data set, and for what is no
    state at all."""
    _require_state(state)
    if rank_local_state:
        parts = {
            slot: {name: rank_local_state.get(name, tensor) for name, tensor in tensors.items()}
            for slot, tensors in state["parts"].items()
        }
        state = {**state, "parts": parts}
    if state["slots"] != dict(step.plan.slots):
        raise UserError(
            f"This state is of {state['method']!r} with parts {state['slots']}, not of "
            f"{step.plan.method!r} with {dict(step.plan.slots)}."
        )
    step.changes.follow(prepared=step.allocated)
    if state["allocated"]:  # otherwise the saved step had not been called
        _load_parts(step, state)
    step.clock.calls, step.clock.named_epoch = state["calls"], state["epoch"]
    step.offset.copy_(state["offset"])
    step.updater.load_state_dict(state["updater"])


def _require_state(state: object) -> None:
    """Raise ``UserError`` unless ``state`` has the entries of ``state_of``, of their types."""
    if not isinstance(state, Mapping):
        raise UserError(f"A step loads what state_dict() returned, not {brief(state)}.")
    for name, kinds in _ENTRIES.items():
        if name not in state:
            raise UserError(
                f"This is no state of a step, since it has no {name!r}: load what state_dict() "
                "returned."
            )
        value = state[name]
        right = isinstance(value, kinds) and not (kinds is not bool and isinstance(value, bool))
        if not right or (name == "calls" and value < 0):
            raise UserError(f"The {name!r} of this state of a step is {brief(value)}: restore it.")
    for slot, tensors in state["parts"].items():
        named = isinstance(tensors, Mapping)
        if not named or not all(isinstance(each, Tensor) for each in tensors.values()):
            raise UserError(
                f"The state of the part {brief(slot)} is {brief(tensors)}, and holds tensors by "
                "name: restore it."
            )


_ENTRIES: Mapping[str, Any] = {
    "method": str,
    "slots": Mapping,
    "calls": int,
    "epoch": (int, float, NoneType),
    "offset": Tensor,
    "parts": Mapping,
    "updater": Mapping,
    "allocated": list,
    "one_pass_stands": bool,
}
"""What ``state_of`` returns: name -> types."""


def _load_parts(step: Internals, state: dict[str, Any]) -> None:
    if not step.allocated:
        step.preparation.allocate(Allocated.loaded(state["allocated"]))
    for slot, part in step.plan.parts.items():
        saved, own = set(state["parts"][slot]), set(part.state)
        # A part with its own way to load knows which names it may lack.
        if type(part).load_state is Part.load_state and saved != own:
            raise UserError(
                f"The saved state of the {slot} {step.plan.slots[slot]!r} holds "
                f"{sorted(saved) or 'nothing'}, and the part keeps {sorted(own) or 'nothing'}: its "
                "code or its options have changed since."
            )
    for slot, part in step.plan.parts.items():
        part.load_state(state["parts"][slot])
    step.net.bn_momenta.stands = state["one_pass_stands"]
    if not step.preparation.prepared:
        step.net.bn_momenta.known_to_stand = step.net.bn_momenta.stands
