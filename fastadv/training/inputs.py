"""The tensors of a call: their values are checked, and two views become one batch."""

from __future__ import annotations

from collections.abc import MutableMapping
from typing import NamedTuple

import torch
from torch import Tensor

from fastadv import kernels, ranges
from fastadv.algorithms.contract import Batch
from fastadv.data.view import View
from fastadv.engine import noise
from fastadv.engine.optimizer.faults import Fault
from fastadv.errors import UserError
from fastadv.kernels import reference_guard
from fastadv.threat import Threat
from fastadv.threat import batch as threats


class Given(NamedTuple):
    """The tensors of a call, of the right shapes; see ``Step.__call__``."""

    x: Tensor
    y: Tensor
    index: Tensor | None  # type: ignore[assignment]  # tuple.index is not used
    start: Tensor | None
    second: Tensor | None
    eps: Tensor | None
    alpha: Tensor | None
    mask: Tensor | None
    targets: Tensor | None


class Inputs(NamedTuple):
    """``Given`` with values in range; ``rows`` (B,) of the training set are always there."""

    x: Tensor
    y: Tensor
    rows: Tensor
    start: Tensor | None
    second: Tensor | None
    eps: Tensor | None
    alpha: Tensor | None
    mask: Tensor | None
    targets: Tensor | None


class Homes(NamedTuple):
    """Tensors to write the images, labels and rows of a call to; None: to new memory."""

    x: Tensor | None = None
    y: Tensor | None = None
    rows: Tensor | None = None


NOWHERE = Homes()


def looked_at(
    given: Given,
    *,
    threat: Threat,
    classes: int | None,
    labels: str,
    num_samples: int | None,
    faults: MutableMapping[Fault, Tensor],
    syncs_are_free: bool,
    first: bool,
    first_row: int,
    homes: Homes = NOWHERE,
) -> Inputs:
    """The inputs, with values in range. Without ``index`` the rows are numbered from ``first_row``.
    ``homes`` may be used where values are not read.

    If reading a value stalls no device (``syncs_are_free``), or if the number of ``classes`` is not
    known yet, a value out of range raises ``UserError``. Otherwise the device notes it in
    ``faults`` (0-dim bool), which mask the update. Images that are not finite raise ``UserError``
    only in the ``first`` batch and mask the update afterwards. The values of ``labels`` "any" are
    not looked at.
    """
    x, y, index, start, second, eps, alpha, mask, targets = given
    of_classes = labels == "classes"
    every_y = [each for each in (y, targets) if each is not None]
    if eps is None and isinstance(threat.eps, Tensor) and threat.eps.dim():
        eps = threat.eps
    radii = [each for each in (eps, alpha) if each is not None]
    if of_classes and classes is not None:
        ranges.require_width(y, classes)
    low, high = threat.ends(x)
    x, second = x.detach(), None if second is None else second.detach()
    if syncs_are_free or classes is None:
        rows = index
        if rows is None:
            rows = torch.arange(first_row, first_row + len(x), device=x.device)
        if not syncs_are_free:
            images = [images for images in (x, second) if images is not None]
            bad = torch.stack([ranges.outside(each, low, high) for each in images]).any()
            faults[Fault.IMAGES].copy_(bad)
        x, finite = ranges.within_if_finite("x", x, low, high)
        if second is not None:
            second, also = ranges.within_if_finite("second", second, low, high)
            finite = finite and also
        if syncs_are_free:
            faults[Fault.IMAGES].fill_(not finite)
        if first and faults[Fault.IMAGES]:
            raise UserError("x holds values that are not finite; look at the data.")
        if of_classes and classes is not None:
            for each in every_y:
                ranges.require_labels(each, classes)
        for each in radii:
            ranges.require_radii(each, threat.widest)
        if index is not None:
            ranges.require_rows(index, num_samples)
        ranges.require_finite("start", start)
        return Inputs(x, y, rows, start, second, eps, alpha, mask, targets)
    # A label or row out of range would abort a CUDA process; the update is masked instead.
    most = torch.iinfo(torch.int64).max if index is None or num_samples is None else num_samples
    hard = y if of_classes and y.ndim == 1 else None
    flags = [faults[kind] for kind in (Fault.IMAGES, Fault.LABELS, Fault.ROWS)]
    look = kernels.look_at_batch
    if isinstance(low, Tensor) or isinstance(high, Tensor):
        look = reference_guard.look_at_batch  # a number for each channel, which no kernel takes
    home = homes if hard is not None else homes._replace(y=None)
    x, clamped, rows = look(
        x, hard, index, (low, high), ranges.ROUNDING, classes, first_row, most, flags, home
    )
    if second is not None:
        faults[Fault.IMAGES].logical_or_(ranges.outside(second, low, high))
        second = second.clamp(low, high)
    if start is not None:
        faults[Fault.IMAGES].logical_or_(~start.isfinite().all())
    if of_classes:
        others = every_y if hard is None else every_y[1:]
        for each in others:
            faults[Fault.LABELS].logical_or_(ranges.labels_outside(each, classes))
    if clamped is not None:
        y = clamped
        targets = None if targets is None else targets.clamp(0, classes - 1)
    # Never cleared: nothing is updated after a bad update.
    for each in radii:
        faults[Fault.RADII].logical_or_(ranges.radii_outside(each, threat.widest))
    return Inputs(x, y, rows, start, second, eps, alpha, mask, targets)


def batch_of(
    inputs: Inputs, offset: Tensor, threat: Threat, view: View | None, labels: str
) -> Batch:
    """The batch as the parts see it, with the threat of its images."""
    y = targets_of(inputs.y, inputs.x, labels)
    targets = None if inputs.targets is None else targets_of(inputs.targets, inputs.x, labels)
    # In the type of the arithmetic: the kernels take no float64 rows beside float32 images.
    wide = torch.promote_types(inputs.x.dtype, torch.float32)
    eps = None if inputs.eps is None else inputs.eps.to(wide)
    alpha = None if inputs.alpha is None else inputs.alpha.to(wide)
    if eps is not None or inputs.mask is not None:
        threat = threat.filled(eps=eps, mask=inputs.mask)
    start, second = inputs.start, inputs.second
    return Batch(inputs.x, y, inputs.rows, offset, threat, view, start, second, alpha, targets)


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
        threat=threats.repeated(batch.threat, 2, len(batch.x)),
        view=None,
        start=None if batch.start is None else batch.start.repeat(2, 1, 1, 1),
        alpha=None if batch.alpha is None else batch.alpha.repeat(2),
        targets=None if batch.targets is None else torch.cat([batch.targets, batch.targets]),
    )
