"""Errors of torch in a forward pass that a user can correct, as one sentence each."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from fastadv.errors import UserError

_TORCH = str(Path(torch.__file__).parent)
_KINDS = (RuntimeError, ValueError, IndexError, TypeError, NotImplementedError)
_OF_IMAGES = (
    *("shape", "size", "channel", "imension", "xpected", "mat1", "not implemented for"),
    "Could not run",
)
"""Words of torch about a tensor that an operation does not take."""
_LONGEST = 200  # characters of torch's own words
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
    if _is_of_torch(error) and any(words in text for words in _OF_IMAGES):
        said = " ".join(text.split())[:_LONGEST].rstrip(".")
        return UserError(
            f"The model cannot take images {tuple(x.shape)} of {x.dtype} as it is: {said}; give it "
            "images of the size, channels and type that it was built for."
        )
    return None


def _is_of_torch(error: Exception) -> bool:
    """True for an error that torch's own code raised, and not the network's: its traceback begins
    there."""
    if isinstance(error, (UserError, torch.OutOfMemoryError)) or type(error) not in _KINDS:
        return False
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    return trace is not None and trace.tb_frame.f_code.co_filename.startswith(_TORCH)
