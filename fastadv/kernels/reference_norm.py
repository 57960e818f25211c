"""BatchNorm with its ReLU and its residuals in three pieces, in plain PyTorch.

``total = x + before``, then ``y = relu((total - mean) * rate * weight + bias + after)``, with one
mean and one rate = 1 / sqrt(var + eps) per channel (Ioffe and Szegedy 2015, Alg. 1). ``before`` is
the skip path of a block that is normalised at its beginning (He et al. 2016), ``after`` that of a
block that ends in BatchNorm (He et al. 2015). Activations are (B,C,...); everything per channel is
(C,), in float32, or in float64 for float64 activations.

Statistics over several processes (as ``torch.nn.SyncBatchNorm``): an ``exchange`` gets what one
process has measured, (3,C), and returns that of all processes, (W,3,C), in the same order
everywhere.
"""

from collections.abc import Callable

import torch
from torch import Tensor

Exchange = Callable[[Tensor], Tensor]


def norm_statistics(
    x: Tensor,
    before: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    momentum: float,
    eps: float,
    exchange: Exchange | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """(total, mean, rate) of ``x`` (B,C,...) in training mode. ``total`` is ``x`` itself without
    ``before``, otherwise the sum, rounded to the type of ``x``.

    The running buffers (C,) move towards the mean and the unbiased variance by ``momentum``, as in
    ``torch.nn.functional.batch_norm``. ``exchange`` gets the count, the mean and the sum of squared
    deviations of each channel. Raises ``ValueError`` for one value per channel, which has no
    variance.
    """
    check_count(x, exchange)
    total = x if before is None else x + before
    values = _wide(total)
    over = [0, *range(2, values.dim())]
    var, mean = torch.var_mean(values, over, correction=0)
    count = values.numel() // values.shape[1]
    if exchange is not None:
        parts = exchange(torch.stack([torch.full_like(mean, count), mean, var * count]))
        return total, *merged(parts, running_mean, running_var, momentum, eps)
    if running_mean is not None:
        _move(running_mean, mean, momentum)
    if running_var is not None:
        _move(running_var, var * (count / (count - 1)), momentum)
    return total, mean, torch.rsqrt(var + eps)


def norm_apply(
    total: Tensor,
    mean: Tensor,
    spread: Tensor,
    eps: float | None,
    weight: Tensor | None,
    bias: Tensor | None,
    after: Tensor | None,
    relu: bool,
) -> Tensor:
    """y (B,C,...), rounded once to the type of ``total``. ``spread`` is the rate if ``eps`` is
    None, otherwise the variance."""
    z = _normalized(total, mean, _rate(spread, eps), weight, bias)
    if after is not None:
        z = z + _wide(after)
    return (torch.relu(z) if relu else z).to(total.dtype)


def norm_gradients(
    grad: Tensor,
    total: Tensor,
    y: Tensor | None,
    mean: Tensor,
    spread: Tensor,
    eps: float | None,
    weight: Tensor | None,
    bias: Tensor | None,
    relu: bool,
    training: bool,
    grad_total: Tensor | None,
    wants_after: bool,
    wants_affine: bool,
    exchange: Exchange | None = None,
    more: Tensor | None = None,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """The gradients for ``total``, ``after``, ``weight`` and ``bias`` from that for y (B,C,...);
    None for those that are not wanted.

    ``y`` is given if there was an ``after``: ReLU's mask is taken from it, and from ``total``
    otherwise. ``grad_total`` reaches ``total`` on another way and is added. In ``training`` mean
    and rate are functions of ``total``; ``exchange`` gets the count and the gradients of bias and
    weight, and only the gradient for ``total`` depends on those of other processes. ``more`` is a
    second part of the gradient for y, from another reader of it.
    """
    rate = _rate(spread, eps)
    g = _wide(grad) if more is None else _wide(grad) + _wide(more)
    if relu:
        shown = y if y is not None else _normalized(total, mean, rate, weight, bias)
        # As PyTorch: a NaN lets the gradient through.
        g = torch.where(shown.to(total.dtype) <= 0, torch.zeros_like(g), g)
    over = [0, *range(2, g.dim())]
    centered = _wide(total) - _along(mean, g)
    of_bias = g.sum(over)
    of_weight = (g * centered).sum(over) * rate
    scale = rate if weight is None else rate * _wide(weight)
    found = g
    if training:
        count: int | Tensor = g.numel() // g.shape[1]
        sum_of_bias, sum_of_weight = of_bias, of_weight
        if exchange is not None:
            own = torch.stack([torch.full_like(of_bias, float(count)), of_bias, of_weight])
            count, sum_of_bias, sum_of_weight = exchange(own).sum(0)
        found = g - _along(sum_of_bias / count, g)
        found = found - centered * _along(rate * sum_of_weight / count, g)
    found = found * _along(scale, g)
    if grad_total is not None:
        found = found + _wide(grad_total)
    return (
        found.to(total.dtype),
        g.to(total.dtype) if wants_after else None,
        of_weight.to(weight.dtype) if wants_affine and weight is not None else None,
        of_bias.to(bias.dtype) if wants_affine and bias is not None else None,
    )


def check_count(x: Tensor, exchange: Exchange | None) -> None:
    """Raises ``ValueError`` if ``x`` (B,C,...) has too few values per channel for a variance."""
    if x.numel() < x.shape[1] * (2 if exchange is None else 1):
        raise ValueError(
            "in training mode BatchNorm needs more than one value per channel, but the shape is"
            f" {tuple(x.shape)}"
        )


def merged(
    parts: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    momentum: float,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """(mean, rate) of all ``parts`` (W,3,C), each of which has a count, a mean and a sum of squared
    deviations; the running buffers move towards them (Chan et al. 1983, Eq. 2.1)."""
    counts, means, squares = parts.unbind(1)
    count = counts.sum(0)
    # From the first mean: where the means are large, their distances have fewer digits to lose.
    mean = means[0] + (counts * (means - means[0])).sum(0) / count
    square = squares.sum(0) + (counts * (means - mean).square()).sum(0)
    if running_mean is not None:
        _move(running_mean, mean, momentum)
    if running_var is not None:
        _move(running_var, square / (count - 1), momentum)
    return mean, torch.rsqrt(square / count + eps)


def _normalized(
    total: Tensor, mean: Tensor, rate: Tensor, weight: Tensor | None, bias: Tensor | None
) -> Tensor:
    """(total - mean) * rate * weight + bias, not rounded. The mean is subtracted first: where it is
    large against the deviation, a shift by mean * rate would cancel."""
    values = _wide(total)
    scale = rate if weight is None else rate * _wide(weight)
    z = (values - _along(mean, values)) * _along(scale, values)
    return z if bias is None else z + _along(_wide(bias), values)


def _rate(spread: Tensor, eps: float | None) -> Tensor:
    return spread if eps is None else torch.rsqrt(_wide(spread) + eps)


def _wide(t: Tensor) -> Tensor:
    return t.to(torch.promote_types(t.dtype, torch.float32))


def _along(values: Tensor, like: Tensor) -> Tensor:
    """``values`` (C,) to compute with beside ``like`` (B,C,...)."""
    return _wide(values).view(-1, *[1] * (like.dim() - 2))


def _move(running: Tensor, towards: Tensor, momentum: float) -> None:
    running.copy_((1 - momentum) * _wide(running) + momentum * towards)
