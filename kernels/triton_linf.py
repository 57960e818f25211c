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
PIXELS = 512


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


@triton.jit
def _normalized_kernel(
    x_adv, grad, x, out, next_input, mean, std, alpha, alpha_ptr, eps, low, high,
    pixels, total, stride_c, stride_p,
    CHANNELS: tl.constexpr, PIXELS: tl.constexpr,
):  # fmt: skip
    alpha = scalar(alpha, alpha_ptr)
    pixel = tl.program_id(0).to(tl.int64) * PIXELS + tl.arange(0, PIXELS)
    inside = pixel < total
    corner = pixel // pixels * (pixels * CHANNELS) + pixel % pixels * stride_p
    for c in tl.static_range(CHANNELS):
        place = corner + c * stride_c
        result = _stepped(x_adv, grad, x, place, inside, alpha, eps, low, high)
        result = result.to(out.dtype.element_ty)
        tl.store(out + place, result, mask=inside)
        centred = result.to(tl.float32) - tl.load(mean + c).to(tl.float32)
        scaled = tl.div_rn(centred, tl.load(std + c).to(tl.float32) + tl.zeros_like(centred))
        scaled = scaled.to(next_input.dtype.element_ty)
        tl.store(next_input + pixel * CHANNELS + c, scaled, mask=inside)


def _flat_step(
    x_adv: Tensor,
    grad: Tensor | None,
    x: Tensor,
    alpha: float | Tensor,
    eps: float,
    low: float,
    high: float,
    out: Tensor | None,
) -> Tensor:
    x_adv = dense(x_adv)
    grad = None if grad is None else laid_out_as(grad, x_adv)
    result = torch.empty_like(x_adv) if out is None else laid_out_as(out, x_adv)
    n = x_adv.numel()
    if n:
        step = float_or_pointer(alpha, x.device)
        launch(
            _linf_kernel, (triton.cdiv(n, BLOCK),), x_adv, grad, laid_out_as(x, x_adv), result,
            *step, eps, low, high, n, device=x.device, BLOCK=BLOCK,
        )  # fmt: skip
    if out is None:
        return result
    if result is out:
        torch.autograd.graph.increment_version(out)
        return out
    return out.copy_(result)


def linf_step(
    x_adv: Tensor,
    grad: Tensor,
    x: Tensor,
    alpha: float | Tensor,
    eps: float,
    low: float = 0.0,
    high: float = 1.0,
    out: Tensor | None = None,
) -> Tensor:
    """See ``reference.linf_step``."""
    return _flat_step(x_adv, grad, x, alpha, eps, low, high, out)


def linf_project(
    x_adv: Tensor, x: Tensor, eps: float, low: float = 0.0, high: float = 1.0
) -> Tensor:
    """See ``reference.linf_project``."""
    return _flat_step(x_adv, None, x, 0.0, eps, low, high, None)


def linf_step_normalized(
    x_adv: Tensor,
    grad: Tensor,
    x: Tensor,
    alpha: float | Tensor,
    eps: float,
    mean: Tensor,
    std: Tensor,
    low: float = 0.0,
    high: float = 1.0,
    dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """See ``reference.linf_step_normalized``."""
    if not x_adv.is_contiguous(memory_format=torch.channels_last):
        x_adv = x_adv.contiguous()
    out = torch.empty_like(x_adv)
    next_input = torch.empty_like(
        x_adv, dtype=dtype or x_adv.dtype, memory_format=torch.channels_last
    )
    batch, channels, height, width = x_adv.shape
    pixels = height * width
    strides = (pixels, 1) if x_adv.is_contiguous() else (1, channels)
    if out.numel():
        launch(
            _normalized_kernel, (triton.cdiv(batch * pixels, PIXELS),),
            x_adv, laid_out_as(grad, x_adv), laid_out_as(x, x_adv), out, next_input,
            mean.contiguous(), std.contiguous(), *float_or_pointer(alpha, x.device),
            eps, low, high, pixels, batch * pixels, *strides, device=x.device,
            CHANNELS=channels, PIXELS=PIXELS,
        )  # fmt: skip
    return out, next_input
