# mypy: allow-untyped-defs
# (a Triton kernel's parameters are not Python values)
"""The L-infinity step in one pass (Triton)."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .layout import dense, float_or_pointer, laid_out_as
from .triton_common import clamp_nan, launch, scalar, sign_or_nan

BLOCK = 1024


@triton.jit
def _stepped(x_adv, grad, x, place, inside, alpha, eps, low, high):
    center = tl.load(x + place, mask=inside).to(tl.float32)
    moved = tl.load(x_adv + place, mask=inside).to(tl.float32)
    if grad is not None:
        # x' + alpha * sign(g)
        moved += sign_or_nan(tl.load(grad + place, mask=inside).to(tl.float32)) * alpha
    # box(clamp(x', x - eps, x + eps))
    return clamp_nan(clamp_nan(moved, center - eps, center + eps), low, high)


@triton.jit
def _linf_kernel(x_adv, grad, x, out, alpha, alpha_ptr, eps, low, high, n, BLOCK: tl.constexpr):
    alpha = scalar(alpha, alpha_ptr)
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = place < n
    result = _stepped(x_adv, grad, x, place, inside, alpha, eps, low, high)
    tl.store(out + place, result.to(out.dtype.element_ty), mask=inside)


def _flat_step(
    x_adv: Tensor,
    grad: Tensor | None,
    x: Tensor,
    alpha: float | Tensor,
    eps: float,
    low: float,
    high: float,
) -> Tensor:
    x_adv = dense(x_adv)
    grad = None if grad is None else laid_out_as(grad, x_adv)
    result = torch.empty_like(x_adv)
    n = x_adv.numel()
    if n:
        step = float_or_pointer(alpha, x.device)
        launch(
            _linf_kernel, (triton.cdiv(n, BLOCK),), x_adv, grad, laid_out_as(x, x_adv), result,
            *step, eps, low, high, n, device=x.device, BLOCK=BLOCK,
        )  # fmt: skip
    return result


def linf_step(
    x_adv: Tensor,
    grad: Tensor,
    x: Tensor,
    alpha: float | Tensor,
    eps: float,
    low: float = 0.0,
    high: float = 1.0,
) -> Tensor:
    """See ``reference.linf_step``."""
    return _flat_step(x_adv, grad, x, alpha, eps, low, high)


def linf_project(
    x_adv: Tensor, x: Tensor, eps: float, low: float = 0.0, high: float = 1.0
) -> Tensor:
    """See ``reference.linf_project``."""
    return _flat_step(x_adv, None, x, 0.0, eps, low, high)
