"""BatchNorm with its ReLU and its residuals: its gradient, and the operator of compiled regions.

The arithmetic is in three entries (``norm_statistics``, ``norm_apply``, ``norm_gradients``), which
run PyTorch or Triton by their arguments. Here they are put together for eager calls;
``norm_operator.py`` is the form for compiled regions.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from . import reference_norm
from .dispatch import define

norm_statistics = define(reference_norm.norm_statistics, "triton_norm")
norm_apply = define(reference_norm.norm_apply, "triton_norm")
norm_gradients = define(reference_norm.norm_gradients, "triton_norm")

_PYTORCHS = functional.batch_norm  # other code may replace the attribute for a while


class Measured(NamedTuple):
    """What BatchNorm knows before it normalises: ``total`` (B,C,...), its ``mean`` (C,) and its
    ``spread`` (C,), which is the rate in ``training`` and the running variance otherwise."""

    total: Tensor
    mean: Tensor
    spread: Tensor
    eps: float
    training: bool

    @property
    def added(self) -> float | None:
        """What must be added to ``spread`` before it is a rate; None if it is one."""
        return None if self.training else self.eps


def measured(
    x: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    training: bool,
    momentum: float,
    eps: float,
    before: Tensor | None = None,
) -> Measured:
    """The statistics of ``x + before`` (B,C,...), which move the running buffers in ``training``;
    otherwise the running buffers themselves. It is not differentiable."""
    x = x.detach()
    before = None if before is None else before.detach()
    if not training:
        if running_mean is None or running_var is None:
            raise ValueError("in evaluation mode BatchNorm needs its running buffers")
        total = x if before is None else x + before
        return Measured(total, running_mean, running_var, eps, False)
    total, mean, rate = norm_statistics(x, before, running_mean, running_var, momentum, eps)
    return Measured(total, mean, rate, eps, True)


def normalized(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    of: Measured,
    before: Tensor | None = None,
    after: Tensor | None = None,
    relu: bool = True,
) -> tuple[Tensor, Tensor]:
    """(y, total) for the statistics ``of`` ``x + before`` (B,C,...), both differentiable.
    ``total`` is ``x`` itself without ``before``."""
    found = _Normalize.apply(x, weight, bias, before, after, of, relu, None)
    return found if before is not None else (found, x)


def deferred(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    of: Measured,
    before: Tensor | None,
    after: Tensor | None,
    stand_in: Callable[[], Tensor],
) -> Tensor:
    """What ``stand_in`` makes, a tensor without values, with the gradient of ``normalized`` without
    ReLU. Nothing is computed."""
    if before is not None:  # the sum itself gets its history from ``normalized``
        of = of._replace(total=of.total.detach())
    found = _Normalize.apply(x, weight, bias, before, after, of, False, stand_in)
    y: Tensor = found if before is None else found[0]
    return y


def fused_norm(
    x: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    training: bool,
    momentum: float,
    eps: float,
    before: Tensor | None = None,
    after: Tensor | None = None,
    relu: bool = True,
) -> tuple[Tensor, Tensor]:
    """(y, total): y = relu(batch_norm(total) + after) with total = x + before, all (B,C,...)."""
    of = measured(x, running_mean, running_var, training, momentum, eps, before)
    return normalized(x, weight, bias, of, before, after, relu)


class _Normalize(torch.autograd.Function):
    """The gradient for ``x`` includes the one through the statistics, which are given."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        before: Tensor | None,
        after: Tensor | None,
        of: Measured,
        relu: bool,
        stand_in: Callable[[], Tensor] | None,
    ) -> Any:
        if stand_in is None:
            y = norm_apply(of.total, of.mean, of.spread, of.added, weight, bias, after, relu)
        else:
            y = stand_in()
        total = x if before is None else of.total
        masked = y if relu and after is not None else None
        # In evaluation mode these are the running buffers: autograd raises if they have moved.
        ctx.save_for_backward(total, weight, bias, of.mean, of.spread, masked)
        ctx.eps, ctx.training, ctx.relu = of.eps, of.training, relu
        ctx.set_materialize_grads(False)
        return y if before is None else (y, total)

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, grad_total: Tensor | None = None) -> Any:
        wants = ctx.needs_input_grad
        if grad is None:  # y is not used
            return grad_total, None, None, grad_total if wants[3] else None, *[None] * 4
        total, weight, bias, mean, spread, y = ctx.saved_tensors
        of = Measured(total, mean, spread, ctx.eps, ctx.training)
        if torch.is_grad_enabled():
            found = _differentiable(grad, of, y, weight, bias, ctx.relu, grad_total, wants[4])
        else:
            found = norm_gradients(
                grad, total, y, mean, spread, of.added, weight, bias, ctx.relu, of.training,
                grad_total, wants[4], wants[1] or wants[2],
            )  # fmt: skip
        of_total, of_after, of_weight, of_bias = found
        of_before = of_total if wants[3] else None
        return of_total, of_weight, of_bias, of_before, of_after, None, None, None


def _differentiable(
    grad: Tensor,
    of: Measured,
    y: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    relu: bool,
    grad_total: Tensor | None,
    wants_after: bool,
) -> tuple[Tensor | None, ...]:
    """``norm_gradients`` by PyTorch's operators, which can be differentiated once more."""
    mean, var = (None, None) if of.training else (of.mean, of.spread)
    z = _PYTORCHS(of.total, mean, var, weight, bias, of.training, 0.0, of.eps)
    if relu:
        shown = z.detach() if y is None else y.detach()
        grad = torch.where(shown <= 0, torch.zeros_like(grad), grad)
    wanted = [t for t in (of.total, weight, bias) if t is not None and t.requires_grad]
    found = torch.autograd.grad(z, wanted, grad, create_graph=True)
    by = dict(zip(map(id, wanted), found, strict=True))
    of_total = by.get(id(of.total))
    if grad_total is not None:
        of_total = grad_total if of_total is None else of_total + grad_total
    return of_total, grad if wants_after else None, by.get(id(weight)), by.get(id(bias))
