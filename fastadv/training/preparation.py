"""The preparation of a step with its first batch: probe the model and allocate the parts' state."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastadv.algorithms.attack_loss import PlanAttackLoss
from fastadv.algorithms.contract import NEEDS, FollowsThreat, Setup
from fastadv.algorithms.contract.returned import fitted
from fastadv.algorithms.label_loss import LabelLoss
from fastadv.algorithms.plan import Plan
from fastadv.algorithms.user_loss import require_per_sample
from fastadv.engine.model.network import Network
from fastadv.errors import UserError, unknown
from fastadv.threat import Threat
from fastadv.training import checks
from fastadv.training.inputs import targets_of
from fastadv.training.settings import RunLength
from fastadv.training.update import Update


class Allocated(NamedTuple):
    """The sizes and the type for which the parts' state was allocated. ``image_shape`` is (C,H,W),
    ``batch_size`` that of the first batch."""

    image_shape: tuple[int, int, int]
    batch_size: int
    dtype: torch.dtype
    num_classes: int

    def saved(self) -> list[Any]:
        """This as lists, numbers and text, for a checkpoint."""
        dtype = str(self.dtype).removeprefix("torch.")
        return [list(self.image_shape), self.batch_size, dtype, self.num_classes]

    @classmethod
    def loaded(cls, saved: list[Any]) -> Allocated:
        """The inverse of ``saved``."""
        shape, batch_size, dtype, num_classes = saved
        return cls(tuple(shape), batch_size, getattr(torch, dtype), num_classes)


class Preparation:
    """``prepared`` is True once a call has prepared the step. ``allocated`` is None until the parts
    have their state. ``seen`` is the version of the model's structure that was probed last, -1
    before."""

    def __init__(
        self, plan: Plan, net: Network, update: Update, length: RunLength, sound: Callable[[], Any]
    ) -> None:
        self.plan, self.net, self.update, self.length = plan, net, update, length
        self._sound = sound
        self.prepared = False
        self.allocated: Allocated | None = None
        self.seen = -1

    def moment(self) -> tuple[Any, ...]:
        """The present state of this object, for ``return_to``."""
        return self.prepared, self.allocated, self.seen

    def return_to(self, moment: tuple[Any, ...]) -> None:
        """Return to the state at which ``moment`` was called."""
        self.prepared, self.allocated, self.seen = moment

    @property
    def known_classes(self) -> int | None:
        """The number of classes, or None if the model has changed since it was probed."""
        if self.allocated is None or self.seen != self.net.structure.inner:
            return None
        return self.allocated.num_classes

    def look(self, x: Tensor, y: Tensor) -> int:
        """The number of classes, from the first forward pass of the model in its present structure.
        ``x`` is (B,C,H,W), ``y`` (B,...). Raises ``UserError`` for logits that do not fit, and for
        a user's loss that is not one value per sample."""
        self.seen = -1  # stays if the probe raises
        with self.net.undivided():
            logits = self.net.probe(x[:2], self.plan.bn_updates)
        if self.plan.class_reader:
            checks.check_class_logits(logits, self.plan.class_reader)
        if self.plan.labels == "any":
            classes = checks.check_outputs(logits, len(x[:2]), self.length.num_classes)
        else:
            classes = checks.check_classes(logits, y, self.length.num_classes)
        fitted = targets_of(y, x, self.plan.labels)
        for part in self.plan.given_losses:
            require_per_sample(part.given_as, part.given_loss, logits, fitted)
        self.seen = self.net.structure.inner
        return classes

    def look_again(self, x: Tensor, y: Tensor) -> None:
        """``look`` if the model has changed. Raises ``UserError`` if the number of classes has
        changed and a part keeps predictions."""
        if self.allocated is None or self.seen == self.net.structure.inner:
            return
        classes, before = self.look(x, y), self.allocated.num_classes
        if classes == before:
            return
        if self.plan.target.sample_state() or "teacher_logits" in self.plan.needs:
            self.seen = -1
            raise UserError(
                f"The model returns {classes} logits and returned {before} when the step began; "
                "this method stores predictions of that size: build the step again."
            )
        for part in self.plan.parts.values():
            part.setup = replace(part.setup, num_classes=classes)
        self.allocated = self.allocated._replace(num_classes=classes)

    def allocate(self, allocated: Allocated) -> None:
        """Give every part its ``Setup``, with which it allocates its state. Raises ``UserError`` if
        a part cannot work in this run or asks for what no step provides, and if two parts have a
        state of one name."""
        plan, update = self.plan, self.update
        length = self.length.in_updates(plan.updates_per_batch)
        setup = Setup(
            net=self.net,
            threat=update.regions.threat,
            device=self.net.device,
            dtype=allocated.dtype,
            image_shape=allocated.image_shape,
            batch_size=allocated.batch_size,
            num_samples=length.num_samples,
            num_classes=allocated.num_classes,
            total_steps=length.total_steps,
            steps_per_epoch=length.steps_per_epoch,
            seed=update.regions.seed,
            method=plan.capabilities,
            attack_loss=PlanAttackLoss(plan, self.net, targeted=update.regions.threat.targeted),
            label_loss=LabelLoss(plan.target),
            fit=partial(fitted, plan.target),
            prepare_batch=plan.target.prepare_batch,
            start=plan.start,
            sound=self._sound,
        )
        for part in plan.parts.values():
            for need in part.requires():
                if need not in NEEDS:
                    raise unknown(f"need of {type(part).__name__}.requires:", need, NEEDS)
            part.prepare(setup)
            for name in part.sample_state():
                if name not in part.state:
                    raise unknown(f"state of {type(part).__name__}.sample_state:", name, part.state)
        if plan.averaging is not None:
            plan.averaging.start(update.parameters.averaged())
        names = Counter(name for part in plan.parts.values() for name in part.state)
        shared = [name for name, count in names.items() if count > 1]
        if shared:
            raise UserError(
                f"Two parts of {plan.method!r} have a state called {shared[0]!r}: give one another "
                "name."
            )
        self.allocated = allocated

    def follow_threat(self, threat: Threat) -> None:
        """Pass ``threat`` on to the parts, for the next update and all after it."""
        if self.allocated is not None:
            loss = PlanAttackLoss(self.plan, self.net, targeted=threat.targeted)
            for part in self.plan.parts.values():
                part.setup = replace(part.setup, threat=threat, attack_loss=loss)
                if isinstance(part, FollowsThreat):
                    part.follow_threat(threat)
