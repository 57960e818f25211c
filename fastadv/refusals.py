"""Parts that cannot be combined, each with the mathematical reason."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from fastadv.errors import UserError

if TYPE_CHECKING:
    from fastadv.plan import Plan

REFUSALS: tuple[tuple[str, Callable[[Plan], bool], str], ...] = (
    (
        "adversary none x objective trades",
        lambda plan: plan.slots["adversary"] == "none" and plan.slots["objective"] == "trades",
        "TRADES compares f(x') with f(x); without an attack x' = x and its KL is identically 0.",
    ),
    (
        "adversary none x regularizer advlc",
        lambda plan: plan.slots["adversary"] == "none" and plan.slots["regularizer"] == "advlc",
        "AdvLC penalises f(x') - f(x); without an attack x' = x and the penalty is identically 0.",
    ),
)


def refuse(plan: Plan) -> None:
    """Raise the reason if two of the plan's parts cannot be combined."""
    for name, applies, reason in REFUSALS:
        if applies(plan):
            raise UserError(f"{name} cannot be combined: {reason}")
