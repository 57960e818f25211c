"""Weaken a perturbation, whatever adversary made it (AdvLC paper, Sec. 4.3 and Fig. 4).

This is no adversary of its own: it acts between any adversary and the outer pass, on the tensor
the outer pass is about to see, so that learned step sizes (APART) and stored perturbations (ATTA,
Free) go through it, their states stay the unweakened ones, and every recipe takes its two options.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastadv import kernels
from fastadv.algorithms.contract import Adversary, Batch
from fastadv.engine import noise


def weakening(adversary: Adversary, batch: Batch, seed: int) -> Tensor | None:
    """What the perturbation of this update is multiplied by; None for full strength.

    (1 - shrink), with its sign changed in a share ``flip_signs`` of the elements (B,C,H,W), each
    drawn independently.
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


def weakened(
    x_adv: Tensor, center: Tensor, factor: Tensor | None, low: float, high: float
) -> Tensor:
    """center + factor (x_adv - center), cut to the box: a turned sign may point out of it."""
    if factor is None:
        return x_adv
    return (center + factor * (x_adv - center)).clamp(low, high)
