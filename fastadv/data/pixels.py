"""Stored bytes as pixels in [0,1]."""

import torch
from torch import Tensor


def unit_images(images: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """uint8 images as pixels in [0,1]: x / 255 in float32, then rounded to ``dtype``."""
    wide = torch.promote_types(dtype, torch.float32)
    return images.to(wide).div_(255).to(dtype)
