"""A resolved recipe: its parts with their options, and what follows from them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from fastadv.algorithms.contract import (
    Adversary,
    AttackLoss,
    Averaging,
    BeginsAtCenter,
    Capabilities,
    CountsCorrect,
    FlatAtCenter,
    ForwardsCenter,
    GivenLoss,
    HasNeighbor,
    Layers,
    LearnsSteps,
    LogsPasses,
    MovesCenter,
    NeedsHardLabels,
    Objective,
    OrdersBatchNorm,
    Part,
    Penalizes,
    ReadsCenterGradient,
    Regularizer,
    Replays,
    SharesForward,
    Start,
    Target,
    Teaches,
    WeightPerturbation,
)
from fastadv.algorithms.parts import PARTS
from fastadv.algorithms.plugins import source_digest
from fastadv.algorithms.recipe import Recipe
from fastadv.engine.model.bn_momentum import ADVERSARIAL, DEFAULT_BN_UPDATES, NATURAL

# The logits of x that an attack's loss may read: an attack on another image needs its own.
READ_BY_ATTACKS = frozenset({"natural_logits_attack", "natural_logits_first"})


@dataclass(frozen=True)
class Plan:
    """A method ready to run: a part for each slot (None for an empty one) and the resolved options.

    ``slots`` is slot -> name of its part, ``options`` name -> value, defaults included.
    """

    method: str
    recipe: Recipe
    slots: Mapping[str, str]
    options: Mapping[str, Any]
    adversary: Adversary
    attack_loss: AttackLoss
    start: Start | None
    objective: Objective
    target: Target
    regularizer: Regularizer | None
    weights: WeightPerturbation | None
    layers: Layers
    averaging: Averaging | None

    @cached_property
    def parts(self) -> dict[str, Part]:
        """Slot -> part, without empty slots, in the order of ``PARTS``."""
        every = {slot: getattr(self, slot) for slot in PARTS}
        return {slot: part for slot, part in every.items() if part is not None}

    @cached_property
    def needs(self) -> frozenset[str]:
        """The entries of ``NEEDS`` that the parts ask of the step and of the loader; constant."""
        return frozenset().union(*(part.requires() for part in self._asking))

    def wants(self, need: str) -> bool:
        """True if a part that is active in this epoch asks for ``need``."""
        return need in self.needs and any(
            part.active and need in part.requires() for part in self._asking
        )

    @cached_property
    def natural_modes(self) -> dict[str, str]:
        """Need -> the mode of BatchNorm in which it forwards x before the attack."""
        return {
            "natural_logits_eval": "eval",
            "natural_logits_attack": self.adversary.attack_bn,
            "natural_logits_first": "train",
        }

    @cached_property
    def _asking(self) -> list[Part]:
        """The parts that an update calls: not the attack's loss if no step follows it."""
        unused = None if self.adversary.gradient_steps else self.attack_loss
        return [part for part in self.parts.values() if part is not unused]

    @cached_property
    def capabilities(self) -> Capabilities:
        """What the parts offer each other."""
        return replace(self._offered, shares_gradient=self.shares_gradient)

    @cached_property
    def _offered(self) -> Capabilities:
        """``capabilities``, from which it follows what the attack shares."""
        adversary, start, loss = self.adversary, self.start, self.attack_loss
        begins: Part = adversary if start is None else start
        own_gradient = adversary.gradient_steps > 0
        return Capabilities(
            attacks=adversary.attacks,
            attacks_any_image=own_gradient or "input_gradient" not in adversary.requires(),
            takes_start=adversary.takes_start,
            begins_at_center=isinstance(begins, BeginsAtCenter) and begins.begins_at_center,
            moves_center=isinstance(adversary, MovesCenter) and adversary.moves_center,
            chosen_start=start is not None,
            keeps_starts=start is not None and bool(start.sample_state()),
            gradient_steps=adversary.gradient_steps,
            attack_bn=adversary.attack_bn,
            counts_correct=isinstance(adversary, CountsCorrect) and adversary.counts_correct,
            flat_attack_loss=isinstance(loss, FlatAtCenter) and loss.flat_at_center,
            attack_loss_per_sample=type(loss).per_sample is not AttackLoss.per_sample,
            fits=self.objective.fits,
            objective_reads_center="natural_logits_train" in self.objective.requires(),
            shares_gradient=False,
            labels=self.target.labels,
            sample_state=self.keeps_sample_state,
            updates_per_batch=self.updates_per_batch,
            needs=self.needs,
        )

    @cached_property
    def keeps_sample_state(self) -> bool:
        """True if a part keeps a row per training sample."""
        return any(part.sample_state() for part in self.parts.values())

    @cached_property
    def keeps_perturbations(self) -> bool:
        """True if the adversary or the start keeps a perturbation of each training image."""
        keeping = [self.adversary, *([] if self.start is None else [self.start])]
        return any(part.sample_state() for part in keeping)

    @cached_property
    def differentiates_twice(self) -> bool:
        """True if the regularizer differentiates an input gradient."""
        return bool(self.needs & {"differentiable_center", "differentiable_input"})

    @cached_property
    def shares_natural_forward(self) -> bool:
        """True if the attack's forward pass at x serves the loss also: the attack is one step from
        there, the weights are the same, and no other pass runs in between."""
        return self._joins and (self.shares_gradient or not self.differentiates_twice)

    @cached_property
    def shares_gradient(self) -> bool:
        """True if the gradient of the attack's one step also serves the regularizer: both are that
        of the cross entropy at x."""
        reads = self.regularizer
        plain = self.attack_loss.is_plain() and self.penalizing is None
        plain = plain and self.target.labels == "classes"
        wanted = isinstance(reads, ReadsCenterGradient) and reads.reads_center_gradient
        return wanted and plain and self._joins

    @cached_property
    def _joins(self) -> bool:
        adversary = self.adversary
        between = self.weights is not None or "teacher_logits" in self.needs
        between = between or self.repeats_attacked or self.neighbor is not None
        able = isinstance(adversary, SharesForward) and adversary.shares_forward(self._offered)
        return able and "natural_logits_train" in self.needs and not between

    @cached_property
    def updates_per_batch(self) -> int:
        """Updates of the weights per batch (Free-m: m)."""
        return self.adversary.updates_per_batch if isinstance(self.adversary, Replays) else 1

    @cached_property
    def followers(self) -> list[Part]:
        """The parts that look at an update after its outer pass."""
        return self._overriding("after")

    @cached_property
    def scheduled(self) -> list[Part]:
        """The parts that change with time."""
        return self._overriding("schedule")

    @cached_property
    def sized(self) -> list[Part]:
        """The parts whose state fits images of one size."""
        return [part for part in self._overriding("check_images") if part.sized()]

    def _overriding(self, hook: str) -> list[Part]:
        own = getattr(Part, hook)
        return [part for part in self.parts.values() if getattr(type(part), hook) is not own]

    # -- abilities of single parts ------------------------------------------------------------

    @cached_property
    def learned(self) -> LearnsSteps | None:
        """The adversary, if its x_adv is differentiated in the outer pass."""
        return self.adversary if isinstance(self.adversary, LearnsSteps) else None

    @cached_property
    def neighbor(self) -> HasNeighbor | None:
        """The regularizer, if it compares with a second attacked image."""
        return self.regularizer if isinstance(self.regularizer, HasNeighbor) else None

    @cached_property
    def penalizing(self) -> Penalizes | None:
        """The target, if it adds a term of its own to the losses."""
        return self.target if isinstance(self.target, Penalizes) else None

    @cached_property
    def teacher(self) -> Teaches | None:
        """The part that runs networks of its own, if there is one."""
        return next((part for part in self.parts.values() if isinstance(part, Teaches)), None)

    @cached_property
    def given_losses(self) -> list[GivenLoss]:
        """The parts with a loss that the user gave as a function."""
        return [part for part in self._asking if isinstance(part, GivenLoss)]

    @cached_property
    def class_reader(self) -> str:
        """The part that needs labels of classes beside a target that takes any; "" if there is
        none."""
        if self.target.labels == "classes":
            return ""
        asking = (slot for slot, part in self.parts.items() if "class_logits" in part.requires())
        slot = next((slot for slot in asking if self.parts[slot] in self._asking), "")
        return f"{slot} {self.slots[slot]!r}" if slot else ""

    @cached_property
    def labels(self) -> str:
        """The labels that the method takes as y, "classes" or "any"."""
        return "classes" if self.class_reader else self.target.labels

    @cached_property
    def hard_labels_only(self) -> str:
        """Why the method takes no soft labels, in words; "" if it takes them."""
        for slot, part in self.parts.items():
            if isinstance(part, NeedsHardLabels):
                return f"{slot} {self.slots[slot]!r} takes none: {part.hard_labels_only}"
        return ""

    @cached_property
    def bn_updates(self) -> tuple[str, ...]:
        """The order in which x and x' update the statistics of BatchNorm after the attack, up to
        the end of the outer pass."""
        objective, start = self.objective, self.start
        order: tuple[str, ...] = DEFAULT_BN_UPDATES
        if isinstance(objective, OrdersBatchNorm):
            order = objective.bn_updates()
        elif self.folds_repetition:
            order = (ADVERSARIAL, ADVERSARIAL)
        moved = isinstance(start, ForwardsCenter) and start.forwards_center
        if moved and self.adversary.attack_bn == "train" and NATURAL in order:
            first = order.index(NATURAL)
            return (*order[:first], *order[first + 1 :])
        return order

    @cached_property
    def repeats_attacked(self) -> bool:
        """True if x' moves the statistics of BatchNorm once more before the outer pass."""
        objective, offered = self.objective, self._offered
        attacks = offered.gradient_steps > 0 and offered.attack_bn == "train"
        return attacks and isinstance(objective, LogsPasses) and objective.logs_attacked

    @cached_property
    def folds_repetition(self) -> bool:
        """True if that pass is of the same images and weights as the outer pass, and directly
        before it, so that one pass may stand for both (``bn_momentum.py``)."""
        adversary = self.adversary
        changed = self.weights is not None or self.learned is not None
        changed = changed or bool(adversary.shrink or adversary.flip_signs)
        between = "natural_logits_train" in self.needs or self.neighbor is not None
        return self.repeats_attacked and not changed and not between

    @cached_property
    def ends_with_clean(self) -> bool:
        """True if x moves the statistics of BatchNorm after the update, at the new weights."""
        return isinstance(self.objective, LogsPasses) and self.objective.logs_clean

    def depends_on(self) -> dict[str, str]:
        """Name -> digest of everything from outside of fastadv that training by this plan depends
        on: teachers, and the files of parts from elsewhere."""
        found = {} if self.teacher is None else self.teacher.depends_on()
        for part in self.parts.values():
            source = source_digest(type(part))
            if source is not None:
                found[f"plugin {source[0]}"] = source[1]
        return found
