# mypy: allow-untyped-defs
# (a Triton kernel's parameters are not Python values)
"""Images cast and padded by channels of zeros in one pass (Triton)."""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .reference_pad import channels_missing
from .triton_common import launch

BLOCK = 256  # pixels of a program


@triton.jit
def _pad_kernel(
    x, out, pixels, plane, C: tl.constexpr, CHANNELS: tl.constexpr, WIDTH: tl.constexpr,
    LAST: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    pixel = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    channel = tl.arange(0, WIDTH)
    inside = (pixel < pixels)[:, None]
    if LAST:
        place = pixel[:, None] * C + channel[None, :]
    else:
        sample = pixel // plane
        first = sample * (plane * C) + (pixel - sample * plane)
        place = first[:, None] + channel[None, :].to(tl.int64) * plane
    value = tl.load(x + place, mask=inside & (channel < C)[None, :], other=0.0).to(tl.float32)
    target = out + pixel[:, None] * CHANNELS + channel[None, :]
    if WIDTH == CHANNELS:
        # A mask over pixels only, so that all channels of one are written by one instruction.
        tl.store(target, value.to(out.dtype.element_ty), mask=inside)
    else:
        kept = inside & (channel < CHANNELS)[None, :]
        tl.store(target, value.to(out.dtype.element_ty), mask=kept)


def pad_channels_forward(x: Tensor, channels: int, dtype: torch.dtype) -> Tensor:
    """``reference_pad.pad_channels`` without a gradient; one launch."""
    channels_missing(x, channels)
    batch, own, height, width = x.shape
    # Both are true for one channel or one pixel; either kernel reads such images right.
    last = x.is_contiguous(memory_format=torch.channels_last)
    source = x if last else x.contiguous()
    out = torch.empty(
        (batch, channels, height, width), dtype=dtype, device=x.device,
        memory_format=torch.channels_last,
    )  # fmt: skip
    pixels = batch * height * width
    if pixels:
        launch(
            _pad_kernel, (triton.cdiv(pixels, BLOCK),), source, out, pixels, height * width,
            device=x.device, C=own, CHANNELS=channels, WIDTH=triton.next_power_of_2(channels),
            LAST=last, BLOCK=BLOCK,
        )  # fmt: skip
    return out


class _PadChannels(torch.autograd.Function):
    @staticmethod
    def forward(x: Tensor, channels: int, dtype: torch.dtype) -> Tensor:
        return pad_channels_forward(x, channels, dtype)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.own, ctx.kind = inputs[0].shape[1], inputs[0].dtype

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        # Differentiable again, and one launch: the cast of a slice.
        return grads[0][:, : ctx.own].to(ctx.kind), None, None


def pad_channels(x: Tensor, channels: int, dtype: torch.dtype) -> Tensor:
    """See ``reference_pad.pad_channels``."""
    padded: Tensor = _PadChannels.apply(x, channels, dtype)
    return padded
