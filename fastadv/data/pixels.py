"""Stored bytes as pixels in [0,1]."""

import torch
from torch import Tensor


def unit_images(
    images: Tensor,
    dtype: torch.dtype = torch.float32,
    layout: torch.memory_format = torch.preserve_format,
) -> Tensor:
    """uint8 images as pixels in [0,1], in ``layout``: x / 255 in float32, then rounded to
    ``dtype``."""
    wide = torch.promote_types(dtype, torch.float32)
    return images.to(wide, memory_format=layout).div_(255).to(dtype)
