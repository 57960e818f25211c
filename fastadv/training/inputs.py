"""The tensors of a call: their values are checked, and two views become one batch."""

from __future__ import annotations

from collections.abc import MutableMapping
from typing import NamedTuple

import torch
from torch import Tensor

from fastadv import ranges
from fastadv.algorithms.contract import Batch
from fastadv.engine import noise
from fastadv.engine.optimizer.faults import Fault
from fastadv.errors import UserError
from fastadv.threat import Threat


class Inputs(NamedTuple):
    """``x``, ``start`` and ``second`` (B,C,H,W); the labels ``y`` (B,...); ``rows`` (B,) of the
    training set."""

    x: Tensor
    y: Tensor
    rows: Tensor
    start: Tensor | None
    second: Tensor | None


def looked_at(
    x: Tensor,
    y: Tensor,
    index: Tensor | None,
    start: Tensor | None,
    second: Tensor | None,
    *,
    threat: Threat,
    classes: int | None,
    labels: str,
    num_samples: int | None,
    faults: MutableMapping[Fault, Tensor],
    syncs_are_free: bool,
    first: bool,
) -> Inputs:
    """The inputs, with values in range.

    If reading a value stalls no device (``syncs_are_free``), or if the number of ``classes`` is not
    known yet, a value out of range raises ``UserError``. Otherwise the device notes it in
    ``faults`` (0-dim bool), which mask the update. Images that are not finite raise ``UserError``
    only in the ``first`` batch and mask the update afterwards. The values of ``labels`` "any" are
    not looked at.
    """
    of_classes = labels == "classes"
    if of_classes and classes is not None:
        ranges.require_width(y, classes)
    low, high = threat.low, threat.high
    x, second = x.detach(), None if second is None else second.detach()
    rows = torch.arange(len(x), device=x.device) if index is None else index
    images = [images for images in (x, second) if images is not None]
    if not syncs_are_free:
        bad = torch.stack([ranges.outside(each, low, high) for each in images]).any()
        faults[Fault.IMAGES].copy_(bad)
    if syncs_are_free or classes is None:
        x, finite = ranges.within_if_finite("x", x, low, high)
        if second is not None:
            second, also = ranges.within_if_finite("second", second, low, high)
            finite = finite and also
        if syncs_are_free:
            faults[Fault.IMAGES].fill_(not finite)
        if first and faults[Fault.IMAGES]:
            raise UserError("x holds values that are not finite; look at the data.")
        if of_classes and classes is not None:
            ranges.require_labels(y, classes)
        if index is not None:
            ranges.require_rows(index, num_samples)
        ranges.require_finite("start", start)
        return Inputs(x, y, rows, start, second)
    # A label or row out of range would abort a CUDA process; the update is masked instead.
    most = num_samples or torch.iinfo(torch.int64).max
    if start is not None:
        faults[Fault.IMAGES].logical_or_(~start.isfinite().all())
    if of_classes:
        faults[Fault.LABELS].copy_(ranges.labels_outside(y, classes))
    faults[Fault.ROWS].copy_(((rows < 0) | (rows >= most)).any())
    second = None if second is None else second.clamp(low, high)
    if of_classes and y.ndim == 1:
        y = y.clamp(0, classes - 1)
    return Inputs(x.clamp(low, high), y, rows.clamp(0, most - 1), start, second)


def targets_of(y: Tensor, x: Tensor, labels: str) -> Tensor:
    """``y``, soft labels (B,classes) in the type of the logits of the images ``x``."""
    if labels == "any" or not y.is_floating_point():
        return y
    return y.to(torch.promote_types(x.dtype, torch.float32))


def two_views(batch: Batch) -> Batch:
    """One batch of 2B images, the first views before the second ones. Raises ``UserError`` if there
    are no second views."""
    if batch.second is None or batch.second.shape != batch.x.shape:
        raise UserError(
            "This method compares two views of each image: pass second=, another "
            f"augmentation of x of the same shape {tuple(batch.x.shape)}."
        )
    return batch._replace(
        x=torch.cat([batch.x, batch.second.detach()]),
        y=torch.cat([batch.y, batch.y]),
        # The same sample twice must not draw the same noise twice.
        index=torch.cat([batch.index, batch.index + noise.SECOND_VIEW]),
        view=None,
        start=None if batch.start is None else batch.start.repeat(2, 1, 1, 1),
    )
