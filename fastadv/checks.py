"""What a step checks about its inputs, once, at its first call (later calls wait for nothing)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fastadv.errors import UserError


def check_batch(x: Tensor, y: Tensor, low: float, high: float) -> None:
    """``x`` (B,C,H,W) float in [low, high], ``y`` (B,) int64 and not negative."""
    if x.ndim != 4 or not x.is_floating_point():
        raise UserError(
            f"x must be float images (B,C,H,W), not {x.dtype} of shape {tuple(x.shape)}."
        )
    if y.shape != x.shape[:1] or y.dtype != torch.int64:
        raise UserError(
            f"y must be int64 labels of shape ({len(x)},), not {y.dtype} of {tuple(y.shape)}."
        )
    smallest, largest = float(x.min()), float(x.max())
    if not (low <= smallest and largest <= high):
        raise UserError(
            f"Images must lie in [{low:g}, {high:g}] but these reach from {smallest:g} to "
            f"{largest:g}; scale them, and put normalisation inside the model."
        )


def check_devices(device: torch.device, **tensors: Tensor | None) -> None:
    """Every tensor lies where the model does."""
    for name, tensor in tensors.items():
        if tensor is not None and tensor.device != device:
            raise UserError(
                f"{name} is on {tensor.device} and the model on {device}; move it there: "
                f"{name}.to({str(device)!r})."
            )


def check_classes(logits: Tensor, y: Tensor, num_classes: int | None) -> int:
    """The number of classes of ``logits`` (B,classes), checked against ``y`` and the caller's."""
    if logits.ndim != 2:
        raise UserError(f"The model must return logits (B,classes), not {tuple(logits.shape)}.")
    found = logits.shape[1]
    if num_classes is not None and num_classes != found:
        raise UserError(f"num_classes is {num_classes} but the model returns {found} logits.")
    smallest, largest = int(y.min()), int(y.max())
    if smallest < 0 or largest >= found:
        raise UserError(
            f"Labels must lie in [0, {found - 1}], the model's classes, but reach from "
            f"{smallest} to {largest}."
        )
    return found


def check_batch_of_one(model: nn.Module, x: Tensor) -> None:
    """BatchNorm in training mode needs more than one value a channel."""
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    if len(x) == 1 and any(module.training or not model.training for module in norms):
        raise UserError(
            "A batch of one image cannot train a network with BatchNorm; use a larger batch size, "
            "or drop the last batch."
        )


def check_index(index: Tensor | None, x: Tensor, num_samples: int | None, needed: bool) -> None:
    """``index`` (B,) int64 rows of the training set, in range and different from each other."""
    if index is None:
        if needed:
            raise UserError(
                "This method remembers something about every training sample: pass index=, the "
                "rows (B,) int64 of the training set that x was made from."
            )
        return
    if index.shape != x.shape[:1] or index.dtype != torch.int64:
        raise UserError(f"index must be int64 of shape ({len(x)},), not {tuple(index.shape)}.")
    if num_samples is not None and not 0 <= int(index.min()) <= int(index.max()) < num_samples:
        raise UserError(
            f"index reaches from {int(index.min())} to {int(index.max())}, outside the "
            f"{num_samples} samples of num_samples=."
        )
