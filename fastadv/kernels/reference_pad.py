"""Images with more channels, for convolutions whose hardware wants a multiple of eight (plain
PyTorch)."""

import torch
from torch import Tensor
from torch.nn import functional


def pad_channels(x: Tensor, channels: int, dtype: torch.dtype) -> Tensor:
    """``x`` (B,C,H,W) in ``dtype``, with channels of zeros behind its own: (B,``channels``,H,W) in
    channels_last.

    Differentiable: the gradient by ``x`` is that of the first C channels, in the type of ``x``. A
    convolution whose weight has zeros in the additional channels computes the same sums. Raises
    ``ValueError`` for fewer channels than ``x`` has.
    """
    missing = channels_missing(x, channels)
    padded = functional.pad(x.to(dtype), (0, 0, 0, 0, 0, missing))
    return padded.contiguous(memory_format=torch.channels_last)


def channels_missing(x: Tensor, channels: int) -> int:
    """How many of ``channels`` the images ``x`` (B,C,H,W) lack; raises as ``pad_channels``."""
    if x.dim() != 4 or channels < x.shape[1]:
        raise ValueError(
            f"Images of shape {tuple(x.shape)} cannot be padded to {channels} channels; pass "
            "(B,C,H,W) and at least C."
        )
    return channels - x.shape[1]
