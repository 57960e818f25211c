"""What a run is, as every part is told it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from fastadv.algorithms.contract.tensors import Context
from fastadv.engine.model.network import Network
from fastadv.threat import Threat


@dataclass(frozen=True)
class Setup:
    """What a run is, told to every part before the first batch, and anew where the caller sets
    another threat or a head with another number of classes.

    ``image_shape`` is (C,H,W); ``batch_size`` is the first batch's. ``total_steps`` counts updates;
    it and ``steps_per_epoch`` are None when the caller did not say. ``attack_steps`` is how many
    gradient steps the adversary takes, ``fits`` which logits the objective fits ("natural" or
    "adversarial").
    ``sound()`` is whether no update was bad so far (0-dim bool on the device): what changes a state
    outside of an update asks it.
    ``attack_loss(logits, y, context)`` is the scalar an adversary maximises: its own objective plus
    the target's term.
    """

    net: Network
    threat: Threat
    device: torch.device
    dtype: torch.dtype
    image_shape: tuple[int, int, int]
    batch_size: int
    num_samples: int | None
    num_classes: int
    total_steps: int | None
    steps_per_epoch: int | None
    seed: int
    needs: frozenset[str]
    attack_steps: int
    fits: str
    attack_loss: Callable[[Tensor, Tensor, Context], Tensor]
    sound: Callable[[], Tensor]

    @property
    def total_epochs(self) -> float | None:
        """How many epochs the run has, where both lengths are known."""
        if self.total_steps is None or not self.steps_per_epoch:
            return None
        return self.total_steps / self.steps_per_epoch
