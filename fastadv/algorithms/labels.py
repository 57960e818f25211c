"""Which labels a plan takes, and which parts a loss of the user's own excludes."""

from __future__ import annotations

from dataclasses import replace

from fastadv.algorithms.plan import Plan
from fastadv.algorithms.targets.criterion import Criterion
from fastadv.algorithms.user_loss import UserLoss
from fastadv.errors import UserError


def with_criterion(plan: Plan, criterion: UserLoss) -> Plan:
    """``plan`` with ``criterion`` in place of its cross entropy. Raises ``UserError`` if its target
    or another part fits something that a criterion of other outputs has not."""
    if not plan.target.is_plain():
        raise UserError(
            f"criterion= would replace the target {plan.slots['target']!r}, by which "
            f"{plan.method!r} trains: choose a method with the target one-hot."
        )
    slots = {**plan.slots, "target": "criterion"}
    plan = replace(plan, target=Criterion(criterion), slots=slots)
    refuse_labels(plan)
    return plan


def refuse_labels(plan: Plan) -> None:
    """Raise ``UserError`` if the target takes labels of any kind and another part needs logits of
    classes."""
    if plan.target.labels != "any":
        return
    if plan.adversary.attack_objective == "kl":
        raise UserError("attack_objective 'kl' cannot be combined with a criterion of your own.")
    for slot, part in plan.parts.items():
        if part.classes_only:
            raise UserError(
                f"{slot} {plan.slots[slot]!r} cannot be combined with a criterion of your own: "
                f"{part.classes_only}, and a criterion may be of other outputs; for a loss of "
                'classes write a target with labels = "classes".'
            )


def hard_labels_only(plan: Plan) -> str:
    """Why ``plan`` takes no soft labels, in words; "" if it takes them."""
    for slot, part in plan.parts.items():
        if part.hard_labels_only:
            return f"{slot} {plan.slots[slot]!r} takes none: {part.hard_labels_only}"
    return ""
