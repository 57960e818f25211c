"""Which values images, labels and rows may have, in one place for training and attacks."""

from __future__ import annotations

from math import isfinite
from typing import Any

import torch
from torch import Tensor

from fastadv.errors import UserError

# Normalising an image and back leaves it a few rounding errors outside of [0, 1].
ROUNDING = 1e-5
# How far the sum of a soft label may be from 1, unless its type is coarser than that.
SUM_ROUNDING = 1e-3


def usable(*tensors: Tensor | None) -> list[Any]:
    """``tensors`` for a graph of their own, None as it is: an inference tensor is copied."""
    return [
        None if tensor is None else tensor.clone() if tensor.is_inference() else tensor.detach()
        for tensor in tensors
    ]


def outside(x: Tensor, low: float | Tensor = 0.0, high: float | Tensor = 1.0) -> Tensor:
    """True if any value of ``x`` is outside of [low, high] by more than rounding, or not a number;
    0-dim bool on its device. The ends are numbers, or tensors with an end for each channel."""
    return ~((x >= low - ROUNDING) & (x <= high + ROUNDING)).all()


def within(name: str, x: Tensor, low: float, high: float) -> Tensor:
    """``x`` with rounding errors cut off; raises ``UserError`` where it is farther outside. Waits.

    Values that are not finite stay: they are a fault of the run, as a loss that is not finite is.
    """
    return within_if_finite(name, x, low, high)[0]


def within_if_finite(
    name: str, x: Tensor, low: float | Tensor, high: float | Tensor
) -> tuple[Tensor, bool]:
    """``within``, and whether all values of ``x`` are finite. The ends are numbers, or tensors
    with an end for each channel (1,C,1,1)."""
    if isinstance(low, Tensor) or isinstance(high, Tensor):
        return _within_channels(name, x, low, high)
    ends = x.aminmax()
    smallest, largest = float(ends.min), float(ends.max)
    if low <= smallest and largest <= high:
        return x, True
    if smallest >= low - ROUNDING and largest <= high + ROUNDING:
        return x.clamp(low, high), True
    if not (isfinite(smallest) and isfinite(largest)):
        return x, False
    raise UserError(
        f"Images must lie in [{low:g}, {high:g}] but {name} reaches from {smallest:g} to "
        f"{largest:g}; divide uint8 images by 255, and put normalisation inside the model."
    )


def _within_channels(
    name: str, x: Tensor, low: float | Tensor, high: float | Tensor
) -> tuple[Tensor, bool]:
    finite = bool(x.isfinite().all())
    if finite and outside(x, low, high):
        far = torch.maximum((low - x).amax((0, 2, 3)), (x - high).amax((0, 2, 3)))
        channel = int(far.argmax())
        ends = [torch.as_tensor(end).expand(1, x.shape[1], 1, 1) for end in (low, high)]
        bounds = [float(end[0, channel, 0, 0]) for end in ends]
        raise UserError(
            f"Images must lie in [{bounds[0]:g}, {bounds[1]:g}] in channel {channel}, but {name} "
            f"is {float(far.max()):g} outside; give low= and high= of the images that the model "
            "is fed."
        )
    box: Any = (low, high)
    return (x.clamp(*box) if finite else x), finite


def require_finite(name: str, given: Tensor | None) -> None:
    """Raise ``UserError`` where a value of ``given`` is not finite. Waits."""
    if given is not None and not given.isfinite().all():
        raise UserError(f"{name} holds values that are not finite.")


def require_labels(y: Tensor, classes: int) -> None:
    """Raise ``UserError`` unless labels ``y`` (B,) lie in [0, classes), or soft labels (B,classes)
    are distributions. Waits."""
    if y.ndim == 2:
        if no_distributions(y):
            raise UserError(
                "Soft labels are probabilities: each row of y is at least 0 and sums to 1; for "
                "labels that are not, such as several per image, pass a loss of your own, "
                "criterion=."
            )
        return
    ends = y.aminmax()
    smallest, largest = int(ends.min), int(ends.max)
    if smallest < 0 or largest >= classes:
        raise UserError(
            f"Labels must lie in [0, {classes - 1}], the model's classes, but reach from "
            f"{smallest} to {largest}; no label is ignored, so leave such samples out."
        )


def labels_outside(y: Tensor, classes: int) -> Tensor:
    """True if a label of ``y`` (B,) is not in [0, classes), or if a soft label (B,classes) is not a
    distribution; 0-dim bool on its device."""
    return no_distributions(y) if y.ndim == 2 else ((y < 0) | (y >= classes)).any()


def hard(y: Tensor) -> Tensor:
    """The class (B,) int64 of each label: ``y`` itself, or the largest entry of soft labels
    (B,classes)."""
    return y if y.ndim == 1 else y.argmax(1)


def no_distributions(y: Tensor) -> Tensor:
    """True if a row of the soft labels ``y`` (B,classes) has a negative entry or does not sum to 1;
    0-dim bool on its device."""
    apart = max(SUM_ROUNDING, torch.finfo(y.dtype).eps / 2)
    wide = y.to(torch.promote_types(y.dtype, torch.float32))
    return ~((wide >= 0).all() & ((wide.sum(1) - 1).abs() <= apart).all())


def require_rows(index: Tensor, num_samples: int | None) -> None:
    """Raise ``UserError`` unless ``index`` (B,) names rows of the training set. Waits."""
    ends = index.aminmax()
    smallest, largest = int(ends.min), int(ends.max)
    if smallest < 0 or (num_samples is not None and largest >= num_samples):
        among = "; rows count from 0"
        if num_samples is not None:
            among = f", outside the {num_samples} samples of num_samples="
        raise UserError(f"index reaches from {smallest} to {largest}{among}.")


def require_width(y: Tensor, classes: int) -> None:
    """Raise ``UserError`` for soft labels ``y`` (B,K) with K other than ``classes``."""
    if y.ndim == 2 and y.shape[1] != classes:
        raise UserError(
            f"y holds soft labels of {y.shape[1]} classes and the model returns {classes} logits."
        )


def radii_outside(radii: Tensor, widest: float) -> Tensor:
    """True if a radius or step (B,) is not in [0, widest]; 0-dim bool on its device."""
    return ~((radii >= 0) & (radii <= widest)).all()


def require_radii(radii: Tensor, widest: float) -> None:
    """Raise ``UserError`` unless each radius or step (B,) lies in [0, widest]. Waits."""
    if radii_outside(radii, widest):
        raise UserError(
            f"eps and alpha of an image lie in [0, {widest:g}] pixels, but reach from "
            f"{float(radii.min()):g} to {float(radii.max()):g}; divide 255ths by 255."
        )


def require_logits(logits: Tensor) -> None:
    """Raise ``UserError`` unless ``logits`` are (B,classes) of several classes."""
    if logits.dim() != 2:
        raise UserError(
            f"The model must return logits of shape (batch, classes), not {tuple(logits.shape)}."
        )
    require_classes(logits.shape[1])


def require_classes(count: int) -> None:
    """Raise ``UserError`` unless there are several."""
    if count < 2:
        raise UserError(
            "The model returns a single logit, whose cross entropy is 0 whatever the label: give "
            "it an output for each class, two for a yes or no."
        )


FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
"""The types that images may have."""


def require_plain(**tensors: Tensor | None) -> None:
    """Raise ``UserError`` for a tensor that is not stored as one block of numbers: sparse, nested,
    quantized. Looks at no value."""
    for name, tensor in tensors.items():
        if tensor is None:
            continue
        if tensor.layout != torch.strided or tensor.is_nested or tensor.is_quantized:
            raise UserError(
                f"{name} must be a dense tensor, not a sparse, nested or quantized one: pass "
                f"{name}.to_dense() or {name}.dequantize()."
            )
        if tensor.is_complex():
            raise UserError(f"{name} holds complex numbers: pass {name}.real.")


def require_float_images(name: str, x: Tensor) -> None:
    """Raise ``UserError`` for images of a float type in which nothing is computed, as float8."""
    if x.dtype not in FLOATS:
        raise UserError(f"{name} is of {x.dtype}, in which nothing computes: pass {name}.float().")
