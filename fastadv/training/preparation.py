"""What a step does with its first batch: look at the model, and allocate the parts' state."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastadv.algorithms.contract import NEEDS, Setup
from fastadv.algorithms.plan import Plan
from fastadv.engine.model.network import Network
from fastadv.errors import UserError
from fastadv.threat import Threat
from fastadv.training import checks
from fastadv.training.settings import RunLength
from fastadv.training.update import Update


class Allocated(NamedTuple):
    """What the parts' state was allocated for. ``image_shape`` is (C,H,W)."""

    image_shape: tuple[int, int, int]
    batch_size: int
    dtype: torch.dtype
    num_classes: int

    def saved(self) -> list[Any]:
        """As a checkpoint keeps it: lists, numbers and text."""
        dtype = str(self.dtype).removeprefix("torch.")
        return [list(self.image_shape), self.batch_size, dtype, self.num_classes]

    @classmethod
    def loaded(cls, saved: list[Any]) -> Allocated:
        """The same of what ``saved`` returned."""
        shape, batch_size, dtype, num_classes = saved
        return cls(tuple(shape), batch_size, getattr(torch, dtype), num_classes)


class Preparation:
    """``prepared``: a batch has been looked at. ``allocated``: None until the parts have their
    state. ``seen``: the version of the model's structure that was probed last."""

    def __init__(
        self, plan: Plan, net: Network, update: Update, length: RunLength, sound: Callable[[], Any]
    ) -> None:
        self.plan, self.net, self.update, self.length = plan, net, update, length
        self._sound = sound
        self.prepared = False
        self.allocated: Allocated | None = None
        self.seen = -1

    def moment(self) -> tuple[Any, ...]:
        """What ``return_to`` needs to undo what a call has noted."""
        return self.prepared, self.allocated, self.seen

    def return_to(self, moment: tuple[Any, ...]) -> None:
        self.prepared, self.allocated, self.seen = moment

    @property
    def known_classes(self) -> int | None:
        """The number of classes; None where the model has changed since it was looked at."""
        if self.allocated is None or self.seen != self.net.structure.inner:
            return None
        return self.allocated.num_classes

    def look(self, x: Tensor, y: Tensor) -> int:
        """The number of classes, from the first forward of this structure of the model."""
        self.seen = -1  # unless it goes well
        logits = self.net.probe(x[:2], self.plan.objective.passes())
        classes = checks.check_classes(logits, y, self.length.num_classes)
        self.seen = self.net.structure.inner
        return classes

    def look_again(self, x: Tensor, y: Tensor) -> None:
        """``look`` after a change of the model; raises ``UserError`` where the parts keep
        predictions of another number of classes."""
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
        """Tell every part what the run is; it allocates its state."""
        plan, update = self.plan, self.update
        length = self.length.in_updates(plan.updates_per_batch)
        setup = Setup(
            net=self.net,
            threat=update.threat,
            device=self.net.device,
            dtype=allocated.dtype,
            image_shape=allocated.image_shape,
            batch_size=allocated.batch_size,
            num_samples=length.num_samples,
            num_classes=allocated.num_classes,
            total_steps=length.total_steps,
            steps_per_epoch=length.steps_per_epoch,
            seed=update.seed,
            needs=plan.needs,
            attack_steps=int(plan.options.get("steps", 1)),
            fits=plan.objective.fits,
            attack_loss=update.attack_loss,
            sound=self._sound,
        )
        unknown_needs = plan.needs - NEEDS
        if unknown_needs:
            raise RuntimeError(f"parts ask for what no step provides: {sorted(unknown_needs)}")
        for part in plan.parts.values():
            part.prepare(setup)
        names = Counter(name for part in plan.parts.values() for name in part.state)
        shared = [name for name, count in names.items() if count > 1]
        if shared:
            raise RuntimeError(f"two parts of {plan.method!r} have a state called {shared[0]!r}")
        if plan.averaging is not None:
            plan.averaging.start(update.named)
        self.allocated = allocated

    def follow_threat(self, threat: Threat) -> None:
        """The parts train against ``threat`` from now on."""
        if self.allocated is not None:
            for part in self.plan.parts.values():
                part.follow_threat(threat)
