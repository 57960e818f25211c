# mypy: allow-untyped-defs
# (a Triton kernel's parameters are not Python values)
"""The L-infinity step in one pass (Triton)."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .layout import dense, float_or_rows, is_dense, laid_out_as
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
def _of_samples(value, pointer, stride, sample, inside):
    """A float argument, or what its tensor holds for each of ``sample``."""
    if pointer is not None:
        value = tl.load(pointer + sample * stride, mask=inside, other=0.0).to(tl.float32)
    return value


@triton.jit
def _linf_kernel(
    x_adv, grad, x, out, alpha, alpha_ptr, alpha_stride, eps, eps_ptr, eps_stride, low, high, n,
    sample_size, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    first = tl.program_id(0).to(tl.int64) * BLOCK
    place = first + tl.arange(0, BLOCK)
    inside = place < n
    if ROWS:
        # One division in 64 bits for the block, those of its elements in 32.
        first_sample = first // sample_size
        element = (first - first_sample * sample_size).to(tl.int32) + tl.arange(0, BLOCK)
        sample = first_sample + element // sample_size
        alpha = _of_samples(alpha, alpha_ptr, alpha_stride, sample, inside)
        eps = _of_samples(eps, eps_ptr, eps_stride, sample, inside)
    else:
        alpha, eps = scalar(alpha, alpha_ptr), scalar(eps, eps_ptr)
    result = _stepped(x_adv, grad, x, place, inside, alpha, eps, low, high)
    tl.store(out + place, result.to(out.dtype.element_ty), mask=inside)


def _flat_step(
    x_adv: Tensor,
    grad: Tensor | None,
    x: Tensor,
    alpha: float | Tensor,
    eps: float | Tensor,
    low: float,
    high: float,
) -> Tensor:
    step, radius = float_or_rows("alpha", alpha, x), float_or_rows("eps", eps, x)
    rows = any(isinstance(value, Tensor) and value.dim() > 0 for value in (alpha, eps))
    x_adv = _samples_in_order(x_adv) if rows else dense(x_adv)
    grad = None if grad is None else laid_out_as(grad, x_adv)
    result = torch.empty_like(x_adv)
    n = x_adv.numel()
    if n:
        launch(
            _linf_kernel, (triton.cdiv(n, BLOCK),), x_adv, grad, laid_out_as(x, x_adv), result,
            *step, *radius, low, high, n, n // x.shape[0], device=x.device, ROWS=rows, BLOCK=BLOCK,
        )  # fmt: skip
    return result


def _samples_in_order(t: Tensor) -> Tensor:
    """``t`` itself if its samples lie one after the other in memory, else a contiguous copy."""
    in_order = t.shape[0] <= 1 or t.stride(0) * t.shape[0] == t.numel()
    return t if is_dense(t) and in_order else t.contiguous()


def linf_step(
    x_adv: Tensor,
    grad: Tensor,
    x: Tensor,
    alpha: float | Tensor,
    eps: float | Tensor,
    low: float = 0.0,
    high: float = 1.0,
) -> Tensor:
    """See ``reference.linf_step``."""
    return _flat_step(x_adv, grad, x, alpha, eps, low, high)


def linf_project(
    x_adv: Tensor, x: Tensor, eps: float | Tensor, low: float = 0.0, high: float = 1.0
) -> Tensor:
    """See ``reference.linf_project``."""
    return _flat_step(x_adv, None, x, 0.0, eps, low, high)
