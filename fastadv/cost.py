"""What a step costs, counted in forward passes: an input gradient is 2, a training pass 3."""

from __future__ import annotations

from dataclasses import dataclass

from fastadv.plan import Plan


@dataclass(frozen=True)
class Passes:
    """Passes of one update: forwards alone, input gradients (forward and backward to the input),
    and training passes (forward and the whole backward); of the weights part at most."""

    forwards: int
    input_gradients: int
    training: int
    weight_rounds: int

    @property
    def units(self) -> float:
        """Forward passes of the same work, weight rounds counted in full."""
        return self.forwards + 2 * self.input_gradients + 3 * (self.training + self.weight_rounds)


def passes(plan: Plan) -> Passes:
    """The passes of one update of ``plan``, double backward of a regularizer not counted."""
    attacked = plan.slots["adversary"] not in ("none", "free")
    steps = int(plan.options.get("steps", 1)) * int(plan.options.get("restarts", 1))
    natural = plan.needs & {"natural_logits_attack", "natural_logits_eval"}
    outer = 2 if "natural_logits_train" in plan.needs else 1
    rounds = 0 if plan.weights is None else int(plan.options.get("weight_steps", 1))
    return Passes(
        forwards=1 if natural else 0,
        input_gradients=steps if attacked else 0,
        training=outer,
        weight_rounds=rounds * outer,
    )


def units(plan: Plan) -> float:
    """``passes(plan).units``."""
    return passes(plan).units
