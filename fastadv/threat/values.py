"""The numbers of a threat: a radius or an end of the box, for all images, each channel or each
image."""

from __future__ import annotations

from typing import Any, TypeAlias

import torch
from torch import Tensor

from fastadv.declared import NonNegative, coerce
from fastadv.errors import UserError
from fastadv.kernels.reference import compute_dtype
from fastadv.kernels.rows import per_sample

Radius: TypeAlias = Any
"""A length in pixels: a number, a tuple with one per channel, or a tensor: 0-dim, or (B,) with one
per image. Any, since these are multiplied with each other in every combination that makes sense."""
Bound: TypeAlias = float | tuple[float, ...]
"""An end of the range of images: a number, or a tuple with one per channel."""


def kept(name: str, value: Any) -> Any:
    """A radius or bound as a threat keeps it: a number, a tuple of numbers, or a tensor of radii.
    ``name`` is "eps", "low" or "high". Raises ``UserError`` for another value."""
    if isinstance(value, Tensor):
        if name != "eps" or value.dim() > 1 or not value.is_floating_point():
            raise UserError(
                f"{name} cannot be a tensor of shape {tuple(value.shape)} and {value.dtype}; eps "
                "may be a floating tensor that is 0-dim or (B,), low and high are numbers or "
                "tuples of numbers."
            )
        return value
    if isinstance(value, (tuple, list)):
        if not value:
            raise UserError(f"{name} has no values; give one for each channel of the images.")
        return tuple(kept(name, entry) for entry in value)
    return coerce("eps", value, NonNegative) if name == "eps" else value


def each(value: float | tuple[float, ...], count: int) -> tuple[float, ...]:
    """The numbers of ``count`` channels."""
    return value if isinstance(value, tuple) else (value,) * count


def widest_range(low: Bound, high: Bound) -> tuple[float, float]:
    """The ends of the channel whose pixels have the widest range."""
    channels = max((len(v) for v in (low, high) if isinstance(v, tuple)), default=1)
    ends = zip(each(low, channels), each(high, channels), strict=True)
    return max(ends, key=lambda pair: pair[1] - pair[0])


def is_by_channel(value: Radius) -> bool:
    """True for a number for each channel: a tuple, or a tensor (1,C,1,1)."""
    return isinstance(value, tuple) or (isinstance(value, Tensor) and value.dim() > 1)


def as_channels(name: str, values: tuple[float, ...], x: Tensor, dtype: torch.dtype) -> Tensor:
    """``values`` as a tensor (1,C,1,...) beside ``x`` (B,C,...)."""
    if x.dim() < 2 or len(values) != x.shape[1]:
        raise UserError(
            f"{name} has {len(values)} values, one per channel, but the images have the shape "
            f"{tuple(x.shape)}; give one number, or as many as the images have channels."
        )
    # Filled on the device: a copy from the host would wait, and no graph could record it.
    parts = [torch.full((1,), value, dtype=dtype, device=x.device) for value in values]
    return torch.cat(parts).view(1, -1, *[1] * (x.dim() - 2))


def beside(name: str, value: Radius, x: Tensor) -> float | Tensor:
    """A radius as it multiplies ``x`` (B,C,...), in the type that its arithmetic runs in: a number,
    or a tensor that is 0-dim, (B,1,1,1) or (1,C,1,1)."""
    dtype = compute_dtype(x.dtype)
    if isinstance(value, tuple):
        return as_channels(name, value, x, dtype)
    if isinstance(value, Tensor) and value.dim() > 1:
        return value.to(dtype)
    return per_sample(name, value, x, dtype)
