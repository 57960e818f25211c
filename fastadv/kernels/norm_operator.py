"""``torch.ops.fastadv.fused_norm``: BatchNorm in training mode with its ReLU and its residuals, as
one operator of a compiled region.

``torch.library.register_autograd`` takes operators without side effects only, and this one moves
the running buffers; so its gradient is a kernel of the dispatch key "Autograd". It has no second
derivative, and says so: a region that differentiates a gradient must not contain it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .layout import laid_out_as
from .norm import norm_apply, norm_gradients, norm_statistics
from .registration import LIBRARY, NAMESPACE

_FORWARD = (
    "fused_norm(Tensor x, Tensor? weight, Tensor? bias, Tensor? before, Tensor? after,"
    " Tensor(a!)? running_mean, Tensor(b!)? running_var, float momentum, float eps, bool relu)"
    " -> (Tensor y, Tensor total, Tensor mean, Tensor rate)"
)
_BACKWARD = (
    "fused_norm_backward(Tensor grad, Tensor? grad_total, Tensor total, Tensor? y, Tensor mean,"
    " Tensor rate, Tensor? weight, Tensor? bias, bool relu, bool wants_after, bool wants_affine,"
    " Tensor? more=None) -> (Tensor of_total, Tensor of_after, Tensor of_weight, Tensor of_bias)"
)
# What a graph contains (``engine/fused_graph.py``): the results of ``_FusedNorm``. Being composite,
# it may return views of one tensor; autograd and a compiler see ``fused_norm`` below it.
_SHARED = (
    "fused_norm_shared(Tensor(c) x, Tensor? weight, Tensor? bias, Tensor? before, Tensor? after,"
    " Tensor(a!)? running_mean, Tensor(b!)? running_var, float momentum, float eps, bool relu)"
    " -> (Tensor(d) y, Tensor(d) y_again, Tensor(c) total)"
)
# A result that is not there has no elements: an operator returns neither None nor its argument.


def _run(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    before: Tensor | None,
    after: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    momentum: float,
    eps: float,
    relu: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    total, mean, rate = norm_statistics(x, before, running_mean, running_var, momentum, eps)
    y = laid_out_as(norm_apply(total, mean, rate, None, weight, bias, after, relu), x)
    return y, x.new_empty(0) if before is None else laid_out_as(total, x), mean, rate


def _run_backward(
    grad: Tensor,
    grad_total: Tensor | None,
    total: Tensor,
    y: Tensor | None,
    mean: Tensor,
    rate: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    relu: bool,
    wants_after: bool,
    wants_affine: bool,
    more: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    of_total, of_after, *others = norm_gradients(
        grad, total, y, mean, rate, None, weight, bias, relu, True, grad_total, wants_after,
        wants_affine, more=more,
    )  # fmt: skip
    if of_after is not None:
        # Without a ReLU it may be the argument itself.
        of_after = laid_out_as(of_after if relu else of_after.clone(), total)
    there = [total.new_empty(0) if found is None else found for found in (of_after, *others)]
    return laid_out_as(of_total, total), there[0], there[1], there[2]


def _promised(
    x: Tensor, weight: Any, bias: Any, before: Tensor | None, after: Any, *others: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    per_channel = x.new_empty(x.shape[1], dtype=torch.promote_types(x.dtype, torch.float32))
    total = x.new_empty(0) if before is None else torch.empty_like(x)
    return torch.empty_like(x), total, per_channel, torch.empty_like(per_channel)


def _promised_backward(
    grad: Tensor,
    grad_total: Tensor | None,
    total: Tensor,
    y: Tensor | None,
    mean: Tensor,
    rate: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    relu: bool,
    wants_after: bool,
    wants_affine: bool,
    more: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    none = total.new_empty(0)
    return (
        torch.empty_like(total),
        torch.empty_like(total) if wants_after else none,
        torch.empty_like(weight) if wants_affine and weight is not None else none.clone(),
        torch.empty_like(bias) if wants_affine and bias is not None else none.clone(),
    )


class _FusedNorm(torch.autograd.Function):
    """y is returned twice, as the same memory, so that the gradients of its readers arrive apart
    and are added where they are read; so are those of ``total``, which without ``before`` is x."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        before: Tensor | None,
        after: Tensor | None,
        *others: Any,
    ) -> tuple[Tensor, ...]:
        with torch._C._AutoDispatchBelowAutograd():
            y, total, mean, rate = FUSED_NORM(x, weight, bias, before, after, *others)
        total = x.view_as(x) if before is None else total
        ctx.save_for_backward(total, weight, bias, mean, rate, y if after is not None else None)
        ctx.relu = others[-1]
        ctx.mark_non_differentiable(mean, rate)
        ctx.set_materialize_grads(False)
        return y, y.view_as(y), total, mean, rate

    @staticmethod
    def backward(
        ctx: Any, grad: Tensor | None, more: Tensor | None, grad_total: Tensor | None, *_: Any
    ) -> Any:
        if torch.is_grad_enabled():  # with create_graph
            raise RuntimeError("torch.ops.fastadv.fused_norm has no second derivative")
        wants = ctx.needs_input_grad
        if grad is None:
            grad, more = more, None
        if grad is None:
            return grad_total, None, None, grad_total if wants[3] else None, None, *[None] * 5
        total, weight, bias, mean, rate, y = ctx.saved_tensors
        of_total, of_after, of_weight, of_bias = torch.ops.fastadv.fused_norm_backward.default(
            grad, grad_total, total, y, mean, rate, weight, bias, ctx.relu, wants[4],
            wants[1] or wants[2], more,
        )  # fmt: skip
        return (
            of_total,
            of_weight if wants[1] else None,
            of_bias if wants[2] else None,
            of_total if wants[3] else None,
            of_after if wants[4] else None,
            *[None] * 5,
        )


def _recorded(
    x: Tensor, weight: Any, bias: Any, before: Tensor | None, *others: Any
) -> tuple[Tensor, ...]:
    if not torch.is_grad_enabled():  # as where compiled code calls it
        with torch._C._AutoDispatchBelowAutograd():
            return FUSED_NORM(x, weight, bias, before, *others)
    y, _, total, mean, rate = _FusedNorm.apply(x, weight, bias, before, *others)
    return y, x.new_empty(0) if before is None else total, mean, rate


def _shared(*arguments: Any) -> tuple[Tensor, ...]:
    return _FusedNorm.apply(*arguments)[:3]


LIBRARY.define(_FORWARD)
LIBRARY.define(_BACKWARD)
for _key in ("CPU", "CUDA"):
    LIBRARY.impl("fused_norm", _run, _key)
    LIBRARY.impl("fused_norm_backward", _run_backward, _key)
torch.library.register_fake(f"{NAMESPACE}::fused_norm", _promised, lib=LIBRARY)
torch.library.register_fake(f"{NAMESPACE}::fused_norm_backward", _promised_backward, lib=LIBRARY)
LIBRARY.impl("fused_norm", _recorded, "Autograd")
LIBRARY.define(_SHARED)
LIBRARY.impl("fused_norm_shared", _shared, "CompositeImplicitAutograd")
FUSED_NORM = torch.ops.fastadv.fused_norm.default
FUSED_NORM_SHARED = torch.ops.fastadv.fused_norm_shared.default
