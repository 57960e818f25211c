"""A loss that the user gives as a function, ``criterion(logits, y) -> (B,)``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from fastadv.engine.model.agreement import draws_kept, host_draws_kept
from fastadv.errors import UserError

UserLoss = Callable[[Tensor, Tensor], Tensor]


def check_function(name: str, given: Any) -> None:
    """Raise ``UserError`` unless ``given``, the value of ``name``, is a function, or a module
    without weights of its own."""
    if not callable(given) or isinstance(given, type):
        raise UserError(
            f"{name} is a function of logits and y that returns a loss per sample, such as "
            f"torch.nn.CrossEntropyLoss(reduction='none'), not {given!r}."
        )
    learns = isinstance(given, nn.Module) and any(p.requires_grad for p in given.parameters())
    if learns:
        raise UserError(
            f"{name} has weights of its own, which no update would train: make them a part of the "
            "model, or freeze them with requires_grad_(False)."
        )


def require_per_sample(name: str, loss: UserLoss, logits: Tensor, y: Tensor) -> None:
    """Raise ``UserError`` unless ``loss(logits, y)`` is one floating-point value per sample, (B,),
    that depends on the logits. ``y`` is (B,...); ``logits`` are those of its first samples, which
    are repeated."""
    rows = torch.arange(len(y), device=logits.device) % len(logits)
    logits = logits.detach()[rows].requires_grad_()
    with torch.enable_grad(), draws_kept(logits.device), host_draws_kept():
        losses = loss(logits, y)
    sentence = f"{name} must return one loss per sample, a float tensor of shape ({len(y)},)"
    if not isinstance(losses, Tensor):
        raise UserError(f"{sentence}, not a {type(losses).__name__}.")
    if losses.ndim == 0:
        raise UserError(f"{sentence}, not one number: pass reduction='none', or omit its mean().")
    if losses.shape != (len(y),) or not losses.is_floating_point():
        way_out = ": take the mean over the others, .flatten(1).mean(1)"
        several = losses.ndim > 1 and len(losses) == len(y) and losses.is_floating_point()
        raise UserError(
            f"{sentence}, not {losses.dtype} of {tuple(losses.shape)}{way_out if several else ''}."
        )
    slope = None
    if losses.requires_grad:
        slope = torch.autograd.grad(losses.sum(), [logits], allow_unused=True)[0]
    if slope is None:
        raise UserError(
            f"{name} does not depend on the logits by a gradient, so nothing can be trained by it: "
            "compute it with differentiable operations of torch."
        )
