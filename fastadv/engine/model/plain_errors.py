"""Errors of torch in a forward pass that a user can correct, as one sentence each."""

from __future__ import annotations

from torch import Tensor, nn

from fastadv.errors import UserError

_OF_TYPES = ("expected scalar type", "should be the same", "same dtype", "to have the same type")


def in_words(error: Exception, model: nn.Module, x: Tensor) -> UserError | None:
    """The ``UserError`` for an ``error`` of ``model(x)``, or None if there is no better text than
    torch's own."""
    text = str(error)
    own = next((p.dtype for p in model.parameters() if p.is_floating_point()), x.dtype)
    if isinstance(error, RuntimeError) and x.dtype != own and any(t in text for t in _OF_TYPES):
        return UserError(
            f"The images are {x.dtype} and the model's weights {own}: pass x.to({own}), or, for a "
            "model in less than float32, keep its weights in float32 and pass amp=True."
        )
    if isinstance(error, ValueError) and "more than 1 value per channel" in text:
        return UserError(
            "BatchNorm cannot train on one value per channel, as in a batch of one image; use a "
            "larger batch size, or drop the last batch."
        )
    return None
