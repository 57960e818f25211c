"""Weaken the perturbation of any adversary (AdvLC paper, Sec. 4.3 and Fig. 4).

It acts between the adversary and the outer pass, on the input of the outer pass. So learned step
sizes (APART) get their gradients through it, the stored perturbations (ATTA, Free) stay those
without weakening, and every recipe takes its two options.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastadv import kernels
from fastadv.algorithms.contract import Adversary, Batch
from fastadv.engine import noise
from fastadv.threat import Threat


def weakening(adversary: Adversary, batch: Batch, seed: int) -> Tensor | None:
    """The factor of the perturbation in this update, 0-dim or (B,C,H,W); None for full strength.

    It is (1 - shrink), with the opposite sign in a share ``flip_signs`` of the elements, each drawn
    independently.
    """
    left = 1.0 - adversary.shrink
    if not adversary.flip_signs:
        whole = torch.full((), left, device=batch.x.device, dtype=batch.x.dtype)
        return whole if adversary.shrink else None
    drawn = kernels.noise_uniform(
        batch.index, tuple(batch.x.shape[1:]), seed, batch.offset, noise.WEAKEN, batch.x.dtype
    )
    flipped = drawn < 2 * adversary.flip_signs - 1
    return torch.where(flipped, -left, left).to(batch.x.dtype)


def weakened(x_adv: Tensor, center: Tensor, factor: Tensor | None, threat: Threat) -> Tensor:
    """center + factor (x_adv - center), clipped to the box, since a flipped sign may point out of
    it. All are (B,C,H,W); ``factor`` may be 0-dim, or None for ``x_adv`` itself."""
    if factor is None:
        return x_adv
    return threat.clip(center + factor * (x_adv - center))
