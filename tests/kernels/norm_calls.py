"""Inputs of the BatchNorm kernels, and the same computation by PyTorch's operators."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from oracle import call, generator
from torch import Tensor

MOMENTUM, EPS = 0.1, 1e-5


class Activations(NamedTuple):
    """What one forward and one backward pass read; ``grad_total`` counts with ``before`` only."""

    x: Tensor
    before: Tensor | None
    after: Tensor | None
    weight: Tensor | None
    bias: Tensor | None
    running_mean: Tensor
    running_var: Tensor
    grad: Tensor
    grad_total: Tensor

    def changed(self, change: Callable[[Tensor], Tensor]) -> "Activations":
        return Activations(*(None if t is None else change(t) for t in self))

    @property
    def parameters(self) -> tuple[Tensor | None, Tensor | None]:
        return self.weight, self.bias


def activations(
    shape: tuple[int, ...],
    dtype: torch.dtype = torch.float32,
    before: bool = True,
    after: bool = True,
    affine: bool = True,
    ratio: float = 0.0,
    seed: int = 0,
) -> Activations:
    """Random numbers, channels_last; ``ratio`` is mean / deviation of each channel, with either
    sign. The gradient is zero near the kink of the ReLU, where rounding decides about the mask."""
    draws = generator(seed)
    channels = shape[1]

    def images(of: torch.dtype = dtype) -> Tensor:
        made = torch.randn(shape, generator=draws, dtype=torch.float64).to(of)
        return made.to(memory_format=torch.channels_last) if len(shape) == 4 else made

    def numbers() -> Tensor:
        return torch.randn(channels, generator=draws)

    sides = numbers().sign().double().view(-1, *[1] * (len(shape) - 2))
    spread = numbers().double().exp().view_as(sides)
    x = ((images(torch.float64) + ratio * sides) * spread).to(dtype)
    given = Activations(
        x,
        images() if before else None,
        images() if after else None,
        numbers() if affine else None,
        numbers() if affine else None,
        numbers(),
        numbers().exp(),
        images(),
        images(),
    )
    far = torch.ones_like(x, dtype=torch.bool)
    for training in (False, True):
        y = by_torch(given.changed(Tensor.double), False, training)[0]
        far &= y.abs() > 0.1
    return given._replace(grad=given.grad * far)


def by_torch(given: Activations, relu: bool, training: bool) -> list[Tensor]:
    """[y, total, running mean and variance, the gradients of x, after, weight and bias where they
    are] by PyTorch's operators."""
    inputs = [given.x, given.after, *given.parameters]
    x, after, weight, bias = leaves = [
        None if t is None else t.detach().requires_grad_() for t in inputs
    ]
    assert x is not None
    running = given.running_mean.clone(), given.running_var.clone()
    total = x if given.before is None else x + given.before
    y = F.batch_norm(total, *running, weight, bias, training, MOMENTUM, EPS)
    y = y if after is None else y + after
    y = torch.relu(y) if relu else y
    value = (y * given.grad).sum()
    if given.before is not None:
        value = value + (total * given.grad_total).sum()
    found = torch.autograd.grad(value, [t for t in leaves if t is not None])
    return [y.detach(), total.detach(), *running, *found]


def by_entries(
    given: Activations, relu: bool, training: bool, backend: str | None = None
) -> list[Tensor]:
    """The same by the three entries, one after the other."""
    x, before, after, weight, bias = given[:5]
    running = given.running_mean.clone(), given.running_var.clone()
    total, mean, spread, added = x, *running, EPS
    options: dict[str, Any] = {"backend": backend}
    if training:
        added = None
        total, mean, spread = call("norm_statistics", x, before, *running, MOMENTUM, EPS, **options)
    elif before is not None:
        total = x + before
    y = call("norm_apply", total, mean, spread, added, weight, bias, after, relu, **options)
    gradients = call(
        "norm_gradients", given.grad, total, None if after is None else y, mean, spread, added,
        weight, bias, relu, training, None if before is None else given.grad_total,
        after is not None, weight is not None, **options,
    )  # fmt: skip
    return [y, total, *running, *(g for g in gradients if g is not None)]
