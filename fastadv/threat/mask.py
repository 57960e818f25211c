"""The mask of a threat: which pixels may move."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastadv.errors import UserError


def check_bool(mask: Any) -> None:
    """Raise ``UserError`` unless ``mask`` is None or a bool tensor."""
    if mask is not None and getattr(mask, "dtype", None) is not torch.bool:
        raise UserError(
            "mask must be a bool tensor, true for the pixels that may move; write mask > 0."
        )


def fits(mask: Tensor, x: Tensor) -> bool:
    """True if ``mask`` is (B or 1,C or 1,H,W) beside ``x`` (B,C,H,W)."""
    if mask.dim() != x.dim() or x.dim() < 3 or mask.shape[2:] != x.shape[2:]:
        return False
    return all(own in (1, of) for own, of in zip(mask.shape[:2], x.shape[:2], strict=True))


def fitting(mask: Tensor | None, x: Tensor) -> Tensor:
    """``mask``; raises ``UserError`` if it does not fit ``x`` (B,C,H,W)."""
    if mask is None:
        raise RuntimeError("this threat has no mask")
    if not fits(mask, x):
        raise UserError(
            f"A mask of shape {tuple(mask.shape)} does not fit images of shape "
            f"{tuple(x.shape)}; give (B or 1, C or 1, H, W)."
        )
    return mask
