"""Checks by logits and input gradients that folded BatchNorms do not change a network."""

from __future__ import annotations

import random
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor

from fastadv.engine.model.bn_fold import Fold


def agree(
    folds: Sequence[Fold],
    forward: Callable[[Tensor], Tensor],
    folded: Callable[[], AbstractContextManager[None]],
    x: Tensor,
) -> bool:
    """True if ``forward`` (B,C,H,W) -> (B,classes) is the same function within ``folded()``.

    With fresh statistics (0 and 1) a BatchNorm is nearly the identity and a wrong fold would not
    show, so the comparison uses other statistics. Logits may differ by the square root of the
    type's rounding step, relative to the largest: rounding stays hundreds of times below (1e-6
    against 3e-4 in float32), and a wrong fold is far above. Gradients may differ by its fourth
    root, in the 2-norm: a ReLU whose input is zero up to rounding may be on either side.
    """
    with _moved_statistics(folds):
        plain = _logits_and_slope(forward, x)
        with folded():
            other = _logits_and_slope(forward, x)
    step = torch.finfo(x.dtype).eps
    logits = (plain[0] - other[0]).abs().max() <= step**0.5 * plain[0].abs().max()
    slopes = (plain[1] - other[1]).norm() <= step**0.25 * plain[1].norm()
    return bool(logits & slopes)


def moved_alike(
    before: Sequence[Tensor], first: Sequence[Tensor], second: Sequence[Tensor]
) -> bool:
    """True if buffers changed from ``before`` to the same values up to rounding (of the change, as
    in ``agree``, and of the value); integers must be equal."""
    alike = len(before) == len(first) == len(second)
    return alike and all(map(_moved_alike, before, first, second))


def _moved_alike(before: Tensor, one: Tensor, other: Tensor) -> bool:
    if one.shape != other.shape or one.dtype != other.dtype:
        return False
    if not one.is_floating_point():
        return torch.equal(one, other)
    if not one.numel():
        return True
    eps = torch.finfo(one.dtype).eps
    moved = (one - before).abs().max() if before.shape == one.shape else one.abs().max()
    return bool((one - other).abs().max() <= eps**0.5 * moved + 32 * eps * one.abs().max())


def _logits_and_slope(forward: Callable[[Tensor], Tensor], x: Tensor) -> tuple[Tensor, Tensor]:
    with host_draws_kept(), draws_kept(x.device), torch.enable_grad():
        x = x.detach().requires_grad_()
        logits = forward(x)
        count = torch.arange(logits.numel(), device=x.device, dtype=logits.dtype)
        loss = (logits * count.cos().view_as(logits)).sum()
        slope = torch.autograd.grad(loss, [x], allow_unused=True)[0] if loss.requires_grad else None
    return logits.detach(), torch.zeros_like(x) if slope is None else slope


@contextmanager
def _moved_statistics(folds: Sequence[Fold]) -> Iterator[None]:
    """Within this context the BatchNorms of ``folds`` have other running statistics of about the
    same size."""
    own = [dict(fold.norm._buffers) for fold in folds]
    try:
        for fold, found in zip(folds, own, strict=True):
            mean, variance = found["running_mean"], found["running_var"]
            if mean is not None and variance is not None:
                wave = torch.arange(len(mean), device=mean.device).cos().to(mean.dtype) / 2
                fold.norm._buffers["running_mean"] = mean + wave * variance.sqrt()
                fold.norm._buffers["running_var"] = variance * (1 + wave)
        yield
    finally:
        for fold, found in zip(folds, own, strict=True):
            fold.norm._buffers.update(found)


@contextmanager
def draws_kept(device: torch.device) -> Iterator[None]:
    """The generators of PyTorch have the same state after this context as before it."""
    cuda = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=cuda):
        yield


@contextmanager
def host_draws_kept() -> Iterator[None]:
    """The global generators of Python and numpy have the same state after this context as before
    it."""
    numpy: Any = sys.modules.get("numpy")
    state, numpys = random.getstate(), numpy.random.get_state() if numpy is not None else None
    try:
        yield
    finally:
        random.setstate(state)
        if numpys is not None:
            numpy.random.set_state(numpys)
