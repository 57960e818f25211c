"""The threat of a batch: of some of its images, of several copies of it, and in a recording.

Only a radius for each image (B,) and the mask change from batch to batch. A 0-dim eps does not: its
value is filled in place.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from fastadv.threat.ball import Threat


def of_rows(threat: Threat, rows: Tensor) -> Threat:
    """The threat for the images ``rows`` (int64) of its batch."""
    radii, mask = _radii(threat), threat.mask
    return threat.filled(
        eps=None if radii is None else radii[rows],
        mask=mask[rows] if mask is not None and len(mask) > 1 else None,
    )


def repeated(threat: Threat, times: int, size: int) -> Threat:
    """The threat of a batch that holds the ``size`` images of this one several ``times``."""
    radii, mask = _radii(threat), threat.mask
    return threat.filled(
        eps=None if radii is None else radii.repeat(times),
        mask=mask.repeat(times, 1, 1, 1) if mask is not None and len(mask) == size else None,
    )


def tensors(threat: Threat) -> list[Tensor]:
    """The tensors that change from batch to batch."""
    return [tensor for tensor in (_radii(threat), threat.mask) if tensor is not None]


def copied(threat: Threat) -> Threat:
    """``threat`` with copies of its ``tensors``."""
    radii, mask = _radii(threat), threat.mask
    return threat.filled(
        eps=None if radii is None else radii.clone(), mask=None if mask is None else mask.clone()
    )


def fixed(threat: Threat) -> tuple[Any, ...]:
    """Everything except the values of tensors: what a recording of a step depends on."""
    eps, mask = threat.eps, threat.mask
    if isinstance(eps, Tensor):
        eps = ("tensor", tuple(eps.shape), 0 if eps.dim() else eps.data_ptr())
    return (
        threat.norm,
        eps,
        (threat.low, threat.high, threat.targeted),
        None if mask is None else tuple(mask.shape),
    )


def _radii(threat: Threat) -> Tensor | None:
    """The radius of each image (B,), if they have one each."""
    return threat.eps if isinstance(threat.eps, Tensor) and threat.eps.dim() else None
