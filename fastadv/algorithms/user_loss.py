"""A loss that the user gives as a function, ``criterion(logits, y) -> (B,)``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from fastadv.engine.gradient import gradients_if_used, leaf
from fastadv.engine.model.agreement import draws_kept, host_draws_kept
from fastadv.errors import UserError, brief

UserLoss = Callable[[Tensor, Tensor], Tensor]


def check_function(name: str, given: Any) -> None:
    """Raise ``UserError`` unless ``given``, the value of ``name``, is a function, or a module
    without weights of its own."""
    if not callable(given) or isinstance(given, type):
        raise UserError(
            f"{name} is a function of logits and y that returns one value per sample, such as "
            f"torch.nn.CrossEntropyLoss(reduction='none'), not {brief(given)}."
        )
    learns = isinstance(given, nn.Module) and any(p.requires_grad for p in given.parameters())
    if learns:
        raise UserError(
            f"{name} has weights of its own, which no update would train: make them a part of the "
            "model, or freeze them with requires_grad_(False)."
        )


def require_values(name: str, values: Any, count: int, *, bools: bool = False) -> None:
    """Raise ``UserError`` unless ``values``, which the function ``name`` returned, are (``count``,)
    and floating, or bool if ``bools``."""
    kind = "bool or float" if bools else "float"
    sentence = f"{name} must return one value per sample, a {kind} tensor of shape ({count},)"
    if not isinstance(values, Tensor):
        raise UserError(f"{sentence}, not a {type(values).__name__}.")
    if values.ndim == 0:
        raise UserError(f"{sentence}, not one number: pass reduction='none', or omit its mean().")
    fits = values.is_floating_point() or (bools and values.dtype == torch.bool)
    if values.shape != (count,) or not fits:
        way_out = ": take the mean over the others, .flatten(1).mean(1)"
        several = values.ndim > 1 and len(values) == count and fits
        raise UserError(
            f"{sentence}, not {values.dtype} of {tuple(values.shape)}{way_out if several else ''}."
        )


def require_per_sample(name: str, loss: UserLoss, logits: Tensor, y: Tensor) -> None:
    """Raise ``UserError`` unless ``loss(logits, y)`` is one floating-point value per sample, (B,),
    that depends on the logits. ``y`` is (B,...); ``logits`` are those of its first samples, which
    are repeated."""
    rows = torch.arange(len(y), device=logits.device) % len(logits)
    logits = leaf(logits.detach()[rows])
    with torch.enable_grad(), draws_kept(logits.device), host_draws_kept():
        losses = loss(logits, y)
    require_values(name, losses, len(y))
    if losses.requires_grad and gradients_if_used(losses.sum(), [logits])[0] is not None:
        return
    raise UserError(
        f"{name} does not depend on the logits by a gradient, so nothing follows from it: compute "
        "it with differentiable operations of torch."
    )
