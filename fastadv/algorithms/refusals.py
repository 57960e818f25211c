"""Combinations of parts that are refused, each with the mathematical reason that a part gives."""

from __future__ import annotations

from fastadv.algorithms.plan import Plan
from fastadv.errors import UserError


def refuse(plan: Plan) -> None:
    """Raise ``UserError`` with the reason if two parts of ``plan`` cannot be combined."""
    for slot, part in plan.parts.items():
        if part is plan.attack_loss and not plan.adversary.gradient_steps:
            continue  # no step follows it
        for other, reason in part.conflicts(plan.capabilities) or ():
            beside = f"{other} {plan.slots[other]}" if other in plan.slots else other
            raise UserError(f"{slot} {plan.slots[slot]} x {beside} cannot be combined: {reason}")
