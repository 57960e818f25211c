"""A plan with losses that the user gives as functions."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace
from typing import Any

from fastadv.algorithms.attack_losses.criterion import CriterionAttack
from fastadv.algorithms.attack_losses.fit import FitAttack
from fastadv.algorithms.plan import Plan
from fastadv.algorithms.refusals import refuse
from fastadv.algorithms.resolution import resolve
from fastadv.algorithms.targets.criterion import Criterion
from fastadv.algorithms.user_loss import UserLoss
from fastadv.errors import UserError


def resolve_with(
    method: str,
    overrides: Mapping[str, Any],
    criterion: UserLoss | None,
    attack_criterion: UserLoss | None,
    taken: Collection[str] = (),
) -> Plan:
    """The plan of ``method`` with ``overrides``, with ``criterion`` in place of its cross entropy,
    in the outer loss and, unless there is an ``attack_criterion``, in the attack. ``taken`` is that
    of ``resolve``.

    Raises ``UserError`` if the method fits another target, and if a part needs logits of classes.
    """
    given = dict(overrides)
    if attack_criterion is not None:
        if given.get("attack_loss") is not None:
            raise UserError("attack_criterion= is the attack's loss: omit attack_loss=.")
        given["attack_loss"] = CriterionAttack(attack_criterion)
    plan = resolve(method, given, taken)
    if criterion is None:
        return plan
    if not plan.target.is_plain():
        raise UserError(
            f"criterion= would replace the target {plan.slots['target']!r}, by which "
            f"{plan.method!r} trains: choose a method with the target one-hot."
        )
    parts: dict[str, Any] = {"target": Criterion(criterion)}
    if given.get("attack_loss") is None and plan.attack_loss.is_plain():
        parts["attack_loss"] = FitAttack()
    names = {"target": "criterion", "attack_loss": "fit"}
    slots = dict(plan.slots) | {slot: names[slot] for slot in parts}
    options = {**plan.options, "criterion": criterion}
    plan = replace(plan, slots=slots, options=options, **parts)
    refuse(plan)
    return plan
