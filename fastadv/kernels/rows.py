"""A radius or a step for each sample: what ``float|Tensor`` arguments with rows may be."""

import torch
from torch import Tensor


def check_rows(name: str, value: float | Tensor, images: Tensor) -> None:
    """Raise ``ValueError`` unless ``value`` is a number, a 0-dim tensor, or has one entry for each
    of the ``images`` (B, ...). Reads shapes only."""
    if isinstance(value, Tensor) and value.dim() and value.shape != images.shape[:1]:
        raise ValueError(
            f"{name} has shape {tuple(value.shape)} for {images.shape[0]} images: give a number, a "
            f"0-dim tensor or one value per image."
        )


def per_sample(
    name: str, value: float | Tensor, images: Tensor, dtype: torch.dtype
) -> float | Tensor:
    """``value`` to compute with beside ``images`` (B, ...): a number and a 0-dim tensor as they
    are, a (B,) tensor as (B, 1, ...) in ``dtype``. Raises as :func:`check_rows` does."""
    check_rows(name, value, images)
    if not isinstance(value, Tensor) or value.dim() == 0:
        return value
    return value.to(dtype).reshape(-1, *[1] * (images.dim() - 1))
