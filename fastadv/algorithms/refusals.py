"""Combinations of parts that are refused, each with the mathematical reason."""

from __future__ import annotations

from collections.abc import Callable

from fastadv.algorithms.plan import Plan
from fastadv.errors import UserError

BOTH_LOSSES = ("clean-mixed", "clean-subtracted")
COUNTING = ("pgd",)  # adversaries that report ``correct_at_each_step``

REFUSALS: tuple[tuple[str, Callable[[Plan], bool], str], ...] = (
    (
        "adversary none x objective trades (rst)",
        lambda plan: _both(plan, adversary=("none",), objective=("trades", "rst")),
        "TRADES compares f(x') with f(x); without an attack x' = x and its KL is identically 0.",
    ),
    (
        "adversary none x shrink or flip_signs",
        lambda plan: (
            plan.slots["adversary"] == "none"
            and bool(plan.adversary.shrink or plan.adversary.flip_signs)
        ),
        "without an attack x' = x, and there is no perturbation to weaken.",
    ),
    (
        "adversary none x regularizer advlc",
        lambda plan: plan.slots["adversary"] == "none" and plan.slots["regularizer"] == "advlc",
        "AdvLC penalises f(x') - f(x); without an attack x' = x and the penalty is identically 0.",
    ),
    (
        "adversary none x objective clean-mixed (clean-subtracted)",
        lambda plan: _both(plan, adversary=("none",), objective=BOTH_LOSSES),
        "both weigh the loss at x' against the loss at x; without an attack they are equal.",
    ),
    (
        "objective gairat x an adversary other than pgd",
        lambda plan: (
            plan.slots["objective"] == "gairat" and plan.slots["adversary"] not in COUNTING
        ),
        "its weights are a function of the steps of PGD at which a sample was still classified "
        "right; this adversary takes no such steps.",
    ),
    (
        "adversary free x regularizer logitalign",
        lambda plan: _both(plan, adversary=("free",), regularizer=("logitalign",)),
        "LogitAlign attacks a second image; Free has no attack beside the outer pass's gradient.",
    ),
    (
        "target distillation x an objective that fits f(x)",
        lambda plan: _both(
            plan, target=("distillation",), objective=("trades", "rst", *BOTH_LOSSES)
        ),
        "the teachers predict for x'; fitting f(x) to their predictions would mix up two images.",
    ),
    (
        "target self-adaptive x objective clean-mixed (clean-subtracted)",
        lambda plan: _both(plan, target=("self-adaptive",), objective=BOTH_LOSSES),
        "a label moves towards the fitted prediction, and this objective fits two.",
    ),
    (
        "regularizer consistency x parts that store state per sample",
        lambda plan: plan.slots["regularizer"] == "consistency" and plan.keeps_sample_state,
        "two views of a sample in one batch would update its stored state in two different ways.",
    ),
    (
        "target temporal-ensembling (self-adaptive) x adversary free",
        lambda plan: (
            plan.slots["target"] in ("temporal-ensembling", "self-adaptive")
            and plan.updates_per_batch > 1
        ),
        "it averages one prediction per sample and epoch, and the replays would give it several "
        "in a row, of one view and nearly the same weights.",
    ),
)


def _both(plan: Plan, **slots: tuple[str, ...]) -> bool:
    """True if each of the named slots holds one of the parts given for it."""
    return all(plan.slots[slot] in parts for slot, parts in slots.items())


def refuse(plan: Plan) -> None:
    """Raise ``UserError`` with the reason if two parts of ``plan`` cannot be combined."""
    for name, applies, reason in REFUSALS:
        if applies(plan):
            raise UserError(f"{name} cannot be combined: {reason}")
