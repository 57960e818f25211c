"""BatchNorm with the statistics of the images of all processes (``--bn global``).

A process sends the number, the mean and the variance of its values per channel, and gets those of
the others; they are merged as Chan, Golub and LeVeque (1983) do it, which subtracts no large
numbers. All of it is differentiated by autograd: the backward pass sends once per BatchNorm also,
and so does the backward pass of that.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from fastadv.engine.process.division import Division, padded_slot

_PYTORCHS = functional.batch_norm


@contextmanager
def whole_statistics(division: Division) -> Iterator[None]:
    """Within this context ``torch.nn.functional.batch_norm`` takes the statistics of a batch over
    the rows of all processes, and ``nn.SyncBatchNorm`` computes as ``nn.BatchNorm2d``.

    The function is replaced by name, as in ``double_backward.py`` and for its reasons.
    """
    around = functional.batch_norm

    def batch_norm(
        input: Tensor,
        running_mean: Tensor | None,
        running_var: Tensor | None,
        weight: Tensor | None = None,
        bias: Tensor | None = None,
        training: bool = False,
        momentum: float = 0.1,
        eps: float = 1e-5,
    ) -> Tensor:
        buffers = running_mean, running_var
        if not training:
            return _PYTORCHS(input, *buffers, weight, bias, False, momentum, eps)
        return normalized(division, input, buffers, weight, bias, momentum, eps)

    functional.batch_norm = batch_norm
    try:
        with own_sync_norms():
            yield
    finally:
        functional.batch_norm = around


@contextmanager
def norms_of_probe() -> Iterator[None]:
    """Within this context, which may be in ``whole_statistics``, every BatchNorm takes the
    statistics of the images that its own process has."""
    around, functional.batch_norm = functional.batch_norm, _PYTORCHS
    try:
        with own_sync_norms():
            yield
    finally:
        functional.batch_norm = around


@contextmanager
def own_sync_norms() -> Iterator[None]:
    """Within this context ``nn.SyncBatchNorm`` sends nothing and computes as ``nn.BatchNorm2d``,
    on every device."""
    around = nn.SyncBatchNorm.forward
    as_batch_norm: Any = nn.modules.batchnorm._BatchNorm.forward
    nn.SyncBatchNorm.forward = as_batch_norm  # type: ignore[method-assign]
    try:
        yield
    finally:
        nn.SyncBatchNorm.forward = around  # type: ignore[method-assign]


def normalized(
    division: Division,
    x: Tensor,
    buffers: tuple[Tensor | None, Tensor | None],
    weight: Tensor | None,
    bias: Tensor | None,
    momentum: float,
    eps: float,
) -> Tensor:
    """``x`` (b,C,...) of this process, normalised per channel with the mean and the variance over
    all processes, times ``weight`` plus ``bias``. The running ``buffers`` move in place, the second
    towards the unbiased variance of all values."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    channels = x.shape[1]
    variance, mean = torch.var_mean(wide, [0, *range(2, x.dim())], correction=0)
    # Exact in float32 up to 2**24 values per channel and process, beyond that to 6e-8.
    count = wide.new_full((1,), x.numel() // channels)
    own = torch.cat([mean, variance, count])
    if not division.live:
        own = own * 0
    every = division.added_up(padded_slot(own, division.rank, division.processes))
    means, variances, counts = every.split([channels, channels, 1], dim=1)
    total = counts.detach().sum()
    shares = counts.detach() / total
    mean = (shares * means).sum(0)
    variance = (shares * (variances + (means - mean).square())).sum(0)
    _move(buffers, mean, variance, total, momentum)
    scale = (variance + eps).rsqrt()
    if weight is not None:
        scale = scale * weight
    shift = -mean * scale if bias is None else bias - mean * scale
    form = (1, channels, *[1] * (x.dim() - 2))
    return torch.addcmul(shift.view(form), wide, scale.view(form)).to(x.dtype)


@torch.no_grad()
def _move(
    buffers: tuple[Tensor | None, Tensor | None],
    mean: Tensor,
    variance: Tensor,
    total: Tensor,
    momentum: float,
) -> None:
    unbiased = variance * (total / (total - 1).clamp(min=1))
    for buffer, value in zip(buffers, (mean, unbiased), strict=True):
        if buffer is not None:
            buffer.mul_(1 - momentum).add_(value.to(buffer.dtype), alpha=momentum)
