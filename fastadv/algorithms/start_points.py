"""Points at which attacks begin: what the adversaries and the start parts draw."""

from __future__ import annotations

import torch
from torch import Tensor

from fastadv import kernels
from fastadv.algorithms.contract import Batch, Setup
from fastadv.engine import noise
from fastadv.engine.noise import Stream
from fastadv.errors import UserError
from fastadv.threat import Threat

NEAR_STD = 0.001  # in pixels: the start of the published code of TRADES


def in_ball(batch: Batch, setup: Setup, restart: int = 0) -> Tensor:
    """A random point (B,C,H,W) of the ball, clipped to the box (``Threat.start``)."""
    where = (batch.x, batch.index, setup.seed, batch.offset)
    return batch.threat.start(*where, noise.START + restart)


def near(batch: Batch, setup: Setup, restart: int = 0) -> Tensor:
    """x + 0.001 N(0,1) (B,C,H,W), not clipped to the box."""
    shape, dtype = tuple(batch.x.shape[1:]), batch.x.dtype
    stream = noise.START + restart
    drawn = kernels.noise_normal(batch.index, shape, setup.seed, batch.offset, stream, dtype)
    return batch.x + batch.threat.movable(NEAR_STD * drawn)


def random_signs(rows: int, setup: Setup, stream: Stream) -> Tensor:
    """1 or -1 in every element, equally probable: (rows,C,H,W), the same in every call."""
    numbers = torch.arange(rows, device=setup.device)
    key = (setup.seed, stream.shift, stream.number)
    drawn = kernels.noise_uniform(numbers, setup.image_shape, *key, setup.dtype)
    return torch.where(drawn < 0, -1.0, 1.0).to(setup.dtype)


def require_cube(threat: Threat) -> None:
    """Raise ``UserError`` for a ball without corners, where an attack is to begin."""
    if threat.norm != "linf":
        raise UserError("This attack begins in a corner of the Linf ball: take norm='linf'.")


def given(batch: Batch) -> Tensor | None:
    """x plus the caller's start, projected to the ball and the box (B,C,H,W); None if the caller
    gave none."""
    if batch.start is None:
        return None
    return batch.threat.project(batch.x + batch.start, batch.x)
