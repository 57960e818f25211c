"""BatchNorm with the statistics of the images of all processes (``--bn global``).

A process sends the number, the mean and the squared deviations of its values per channel, and gets
those of the others; they are merged as Chan, Golub and LeVeque (1983) do it, which subtracts no
large numbers. The backward pass sends once per BatchNorm, too. Where it is differentiated itself,
everything is made of operations that autograd knows, of any order.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from fastadv import kernels
from fastadv.engine.model.replaced_norm import pytorchs, replaced
from fastadv.engine.process.distributed import every_row
from fastadv.engine.process.division import Division, padded_slot

Buffers = tuple[Tensor | None, Tensor | None]


@contextmanager
def whole_statistics(division: Division, *, twice: bool = False) -> Iterator[None]:
    """Within this context ``torch.nn.functional.batch_norm`` takes the statistics of a batch over
    the rows of all processes, and ``nn.SyncBatchNorm`` computes as ``nn.BatchNorm2d``. ``twice``:
    most backward passes are differentiated themselves.
    """

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
            return pytorchs(input, *buffers, weight, bias, False, momentum, eps)
        if twice:
            live = division.live
            return normalized(division, live, input, buffers, weight, bias, momentum, eps)
        found: Tensor = _WholeNorm.apply(input, weight, bias, division, buffers, momentum, eps)
        return found

    with replaced(batch_norm), own_sync_norms():
        yield


@contextmanager
def norms_of_probe() -> Iterator[None]:
    """Within this context, which may be in ``whole_statistics``, every BatchNorm takes the
    statistics of the images that its own process has."""
    with replaced(pytorchs), own_sync_norms():
        yield


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


class _WholeNorm(torch.autograd.Function):
    """BatchNorm by the kernels' entries; see ``normalized``."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        division: Division,
        buffers: Buffers,
        momentum: float,
        eps: float,
    ) -> Tensor:
        _, mean, rate = kernels.norm_statistics(
            x, None, *buffers, momentum, eps, partial(_every, division.live)
        )
        ctx.save_for_backward(x, weight, bias, mean, rate)
        ctx.division, ctx.eps, ctx.live = division, eps, division.live
        y: Tensor = kernels.norm_apply(x, mean, rate, None, weight, bias, None, False)
        return y

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        x, weight, bias, mean, rate = ctx.saved_tensors
        if torch.is_grad_enabled():
            found = _differentiable(gradient, x, weight, bias, ctx)
            return *found, None, None, None, None
        of_x, _, of_weight, of_bias = kernels.norm_gradients(
            gradient, x, None, mean, rate, None, weight, bias, False, True, None, False,
            ctx.needs_input_grad[1] or ctx.needs_input_grad[2], partial(_every, ctx.live),
        )  # fmt: skip
        if not ctx.live:  # its rows are none of the batch, and the statistics not theirs
            of_x = torch.zeros_like(of_x)
        return of_x, of_weight, of_bias, None, None, None, None


def _every(live: bool, own: Tensor) -> Tensor:
    """What all processes have measured (W,3,C), in which this one has ``own`` (3,C)."""
    return every_row((own if live else own * 0)[None])


def _differentiable(
    gradient: Tensor,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    ctx: Any,
) -> list[Tensor | None]:
    """The gradients for ``x``, ``weight`` and ``bias``, which can be differentiated once more."""
    y = normalized(ctx.division, ctx.live, x, (None, None), weight, bias, 0.0, ctx.eps)
    given = (x, weight, bias)
    wanted = [each for each in given if each is not None and each.requires_grad]
    found = dict(
        zip(
            map(id, wanted),
            torch.autograd.grad(y, wanted, gradient, create_graph=True),
            strict=True,
        )
    )
    return [None if each is None else found.get(id(each)) for each in given]


def normalized(
    division: Division,
    live: bool,
    x: Tensor,
    buffers: Buffers,
    weight: Tensor | None,
    bias: Tensor | None,
    momentum: float,
    eps: float,
) -> Tensor:
    """``x`` (b,C,...) of this process, normalised per channel with the mean and the variance over
    all processes, times ``weight`` plus ``bias``. The running ``buffers`` move in place, the second
    towards the unbiased variance of all values. Rows that are not ``live`` do not count."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    channels = x.shape[1]
    variance, mean = torch.var_mean(wide, [0, *range(2, x.dim())], correction=0)
    # Exact in float32 up to 2**24 values per channel and process, beyond that to 6e-8.
    count = wide.new_full((1,), x.numel() // channels)
    own = torch.cat([mean, variance, count])
    if not live:
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
    buffers: Buffers,
    mean: Tensor,
    variance: Tensor,
    total: Tensor,
    momentum: float,
) -> None:
    unbiased = variance * (total / (total - 1).clamp(min=1))
    for buffer, value in zip(buffers, (mean, unbiased), strict=True):
        if buffer is not None:
            buffer.mul_(1 - momentum).add_(value.to(buffer.dtype), alpha=momentum)
