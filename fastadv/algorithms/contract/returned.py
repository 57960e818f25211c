"""What parts return, by its shape: a mistake in a part is told in one sentence, with its name."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from fastadv.algorithms.contract.target import Target
from fastadv.algorithms.contract.tensors import Adversarial, Context
from fastadv.errors import UserError


def per_image(given: Tensor, count: int, part: object, hook: str) -> Tensor:
    """``given``, which ``hook`` of ``part`` returned. Raises ``UserError`` unless it is
    (``count``,): a sum or mean over other shapes would be another loss."""
    if not isinstance(given, Tensor) or given.shape != (count,):
        raise UserError(
            f"{type(part).__name__}.{hook} must return one value per image, a tensor of shape "
            f"({count},), not {_said(given)}."
        )
    return given


def fitted(target: Target, logits: Tensor, y: Tensor, context: Context) -> Tensor:
    """The loss (B,) of ``target.fit``, checked like ``per_image``."""
    losses = target.fit(logits, y, context)
    if not isinstance(losses, Tensor) or losses.shape != (len(logits),):
        per_image(losses, len(logits), target, target.fit.__name__)  # raises
    return losses


def number(given: Tensor, part: object, hook: str) -> Tensor:
    """``given``, which ``hook`` of ``part`` returned. Raises ``UserError`` unless it is 0-dim."""
    if not isinstance(given, Tensor) or given.dim():
        raise UserError(
            f"{type(part).__name__}.{hook} must return one number for the batch, a 0-dim tensor, "
            f"not {_said(given)}."
        )
    return given


def images(given: Tensor, x: Tensor, part: object, hook: str) -> Tensor:
    """``given``, which ``hook`` of ``part`` returned. Raises ``UserError`` unless it has the shape
    and the type of the images ``x``."""
    if not isinstance(given, Tensor) or given.shape != x.shape or given.dtype != x.dtype:
        raise UserError(
            f"{type(part).__name__}.{hook} must return images of shape {tuple(x.shape)} and "
            f"{x.dtype}, not {_said(given)}."
        )
    return given


def attacked(given: Adversarial, x: Tensor, part: object) -> Adversarial:
    """``given``, which ``make`` of ``part`` returned. Raises ``UserError`` unless it holds images
    like ``x``."""
    if not isinstance(given, Adversarial):
        raise UserError(
            f"{type(part).__name__}.make must return Adversarial(x_adv, center, context), not "
            f"{_said(given)}."
        )
    for found in (given.x_adv, given.center):
        if found is not x and (found.shape != x.shape or found.dtype != x.dtype):
            images(found, x, part, "make")  # raises
    return given


def _said(given: Any) -> str:
    if not isinstance(given, Tensor):
        return f"a {type(given).__name__}"
    return f"{tuple(given.shape)} and {given.dtype}"
