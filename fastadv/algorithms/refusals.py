"""Combinations of parts that are refused, each with the mathematical reason that a part gives."""

from __future__ import annotations

from fastadv.algorithms.contract import Teaches
from fastadv.algorithms.plan import Plan
from fastadv.errors import UserError


def refuse(plan: Plan) -> None:
    """Raise ``UserError`` with the reason if two parts of ``plan`` cannot be combined."""
    teaching = [slot for slot, part in plan.parts.items() if isinstance(part, Teaches)]
    if len(teaching) > 1:
        first, second = (f"{slot} {plan.slots[slot]}" for slot in teaching[:2])
        raise UserError(
            f"{first} x {second} cannot be combined: each of them reads networks beside the model, "
            "and an update asks one part for their predictions."
        )
    for slot, part in plan.parts.items():
        if part is plan.attack_loss and not plan.adversary.gradient_steps:
            continue  # no step follows it
        for other, reason in part.conflicts(plan.capabilities) or ():
            beside = f"{other} {plan.slots[other]}" if other in plan.slots else other
            raise UserError(f"{slot} {plan.slots[slot]} x {beside} cannot be combined: {reason}")
