"""The ball of a threat: random starts, steps and projections in it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from math import inf
from typing import Any

import torch
from torch import Tensor

from fastadv import kernels
from fastadv.declared import Positive, coerce, parse_number
from fastadv.errors import UserError, brief, unknown
from fastadv.kernels.philox import sample_radius
from fastadv.kernels.reference import compute_dtype
from fastadv.kernels.reference_guard import EDGE
from fastadv.threat.mask import check_bool, fitting
from fastadv.threat.values import (
    Bound,
    Radius,
    as_channels,
    beside,
    each,
    is_by_channel,
    kept,
    widest_range,
)

NORMS = ("linf", "l2")
USUAL_EPS = {"linf": 8 / 255, "l2": 128 / 255}
"""Default radius per norm, in pixels: that of the papers' CIFAR tables."""


def usual_threat(norm: str, eps: float | str | Tensor | None = None) -> Threat:
    """The ball of ``norm``; ``eps`` in pixels: a number, "8/255", a tensor (0-dim or one for each
    image), or None for ``USUAL_EPS``."""
    if isinstance(eps, Tensor):
        return Threat(norm, eps)
    radius = USUAL_EPS.get(str(norm), 0.0) if eps is None else parse_number(eps, "eps")
    return Threat(norm, radius)


@dataclass(frozen=True)
class Threat:
    """The allowed perturbations: a ball of radius ``eps`` around each image, clipped to a box.

    ``norm`` is ``"linf"`` (default) or ``"l2"`` (per image, over all its values). ``eps``, ``low``
    and ``high`` are in pixel units; images and adversarial examples lie in ``[low, high]``, by
    default [0,1]. ``eps`` None is 8/255 in Linf and 128/255 in L2.

    ``eps`` may be a tensor: 0-dim (its value may be filled in place), or (B,), a radius for each
    image of the batch. ``low``, ``high``, and in Linf ``eps`` may be tuples with a number for each
    channel, for a model that is fed normalised images (see ``normalized``). ``mask``, bool
    (B or 1,C or 1,H,W), is true for the pixels that may move; the others keep their values exactly,
    and an L2 norm is over those that may move. ``targeted``: the labels are those that the attack
    wants to reach. ``nominal`` is the largest eps as a number.

    A number for ``low``, ``high`` and a number or tensor for ``eps`` is one kernel per step; a
    tuple or a mask adds elementwise operations.

    Raises ``UserError`` for an unknown norm, a negative eps, an eps in Linf above the range of a
    pixel, tuples of different lengths, an eps per channel in L2, and a mask that is not bool. The
    values of a tensor are not checked. That tuples and mask fit the images is checked at use.
    Threats are equal if their numbers are, and their tensors are the same objects.
    """

    norm: str = "linf"
    eps: Radius = None  # the usual one of the norm
    low: Bound = 0.0
    high: Bound = 1.0
    mask: Tensor | None = None
    targeted: bool = False
    # Computed; only a tensor keeps the one it is given, so that nobody waits for its values.
    _one_kernel: bool = field(init=False, repr=False, compare=False)  # neither tuples nor a mask
    nominal: float = field(default=None, repr=False, compare=False, kw_only=True)  # type: ignore[assignment]

    def __post_init__(self) -> None:
        if self.norm not in NORMS:
            raise unknown("norm", self.norm, NORMS)
        if self.eps is None:
            object.__setattr__(self, "eps", USUAL_EPS[self.norm])
        for name in ("eps", "low", "high"):
            object.__setattr__(self, name, kept(name, getattr(self, name)))
        check_bool(self.mask)
        if not isinstance(self.targeted, bool):
            raise UserError(f"targeted is True or False, not {brief(self.targeted)}.")
        eps, low, high = self.eps, self.low, self.high
        lengths = {len(value) for value in (eps, low, high) if isinstance(value, tuple)}
        if len(lengths) > 1:
            raise UserError(
                "eps, low and high have different numbers of values; give one number, or as many "
                "as the images have channels."
            )
        if isinstance(eps, tuple) and self.norm == "l2":
            raise UserError(
                "In L2 eps is one radius for a whole image; give one number instead of one per "
                "channel."
            )
        self._settle()
        if isinstance(eps, Tensor):
            if self.nominal is None:
                object.__setattr__(self, "nominal", float(eps.max()) if eps.numel() else 0.0)
            return
        channels = max(lengths, default=1)
        radii = each(eps, channels)
        object.__setattr__(self, "nominal", max(radii))
        for radius, least, most in zip(
            radii, each(low, channels), each(high, channels), strict=True
        ):
            if not least < most:
                where = " in each channel" if lengths else ""
                raise UserError(f"low must be below high{where}, not {low} and {high}.")
            if self.norm == "linf" and radius > most - least:
                raise UserError(
                    f"eps={radius:g} is more than the whole range of a pixel, [{least:g}, "
                    f"{most:g}]; did you mean {radius:g}/255?"
                )

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Threat):
            return NotImplemented
        return all(
            a is b if isinstance(a, Tensor) or isinstance(b, Tensor) else a == b
            for a, b in zip(self._compared(), other._compared(), strict=True)
        )

    def __hash__(self) -> int:
        return hash(self._compared())

    def _compared(self) -> tuple[Any, ...]:
        return (self.norm, self.eps, self.low, self.high, self.mask, self.targeted)

    @classmethod
    def normalized(
        cls,
        mean: Sequence[float],
        std: Sequence[float],
        norm: str = "linf",
        eps: float | str | None = None,
    ) -> Threat:
        """The threat for a model that is fed (x - mean)/std, x in [0,1], with a ``mean`` and a
        ``std`` for each channel; ``eps`` in pixels of x, as in ``usual_threat``.

        An attack on (x - mean)/std in this threat is the attack on x in [0,1] of the model with the
        normalisation inside. Raises ``UserError`` for lists of different lengths, a std that is
        not positive, and in L2 for unequal stds: the ball of x would be an ellipsoid.
        """
        mean = [parse_number(value, "mean") for value in mean]
        std = [coerce("std", value, Positive) for value in std]
        if len(mean) != len(std) or not std:
            raise UserError("mean and std must have one number for each channel of the images.")
        radius = usual_threat(norm, eps).eps
        low = tuple((0 - m) / s for m, s in zip(mean, std, strict=True))
        high = tuple((1 - m) / s for m, s in zip(mean, std, strict=True))
        if norm == "linf":
            return cls(norm, tuple(radius / s for s in std), low, high)
        if len(set(std)) > 1:
            raise UserError(
                "An L2 ball of images with a std for each channel is an ellipsoid of the model's "
                "inputs; use one std for all channels, or put the normalisation into the model."
            )
        return cls(norm, radius / std[0], low, high)

    def filled(self, eps: Tensor | None = None, mask: Tensor | None = None) -> Threat:
        """The same threat for one batch: with ``eps``, 0-dim or (B,), and ``mask`` (B or 1,C or
        1,H,W) in place of its own (None: its own).

        Nothing is checked and no value is read, so that this may be called in a compiled region and
        while a graph is recorded. ``nominal`` stays.
        """
        return self._like(
            self.eps if eps is None else eps,
            self.low,
            self.high,
            self.mask if mask is None else mask,
        )

    def with_eps(self, eps: Radius) -> Threat:
        """The same threat with another eps, checked."""
        return Threat(self.norm, eps, self.low, self.high, self.mask, self.targeted)

    def unboxed(self) -> Threat:
        """The same threat without a range of images; may be called where ``filled`` may."""
        return self._like(self.eps, -inf, inf, self.mask)

    def unbounded(self) -> Threat:
        """The same threat without a ball: only the box and the mask hold."""
        return self._like(inf, self.low, self.high, self.mask)

    def scaled(self, factor: float) -> Threat:
        """The same threat with ``factor`` times eps."""
        made = self._like(self.of_eps(factor), self.low, self.high, self.mask)
        object.__setattr__(made, "nominal", self.nominal * factor)
        return made

    def _like(self, eps: Radius, low: Bound, high: Bound, mask: Tensor | None) -> Threat:
        made = object.__new__(Threat)
        for name, value in (
            ("norm", self.norm),
            ("eps", eps),
            ("low", low),
            ("high", high),
            ("mask", mask),
            ("targeted", self.targeted),
            ("nominal", self.nominal),
        ):
            object.__setattr__(made, name, value)
        made._settle()
        return made

    def _settle(self) -> None:
        plain = not any(isinstance(value, tuple) for value in (self.eps, self.low, self.high))
        object.__setattr__(self, "_one_kernel", plain and self.mask is None)

    def require_step(self, alpha: Radius | None) -> None:
        """Raise ``UserError`` if ``alpha`` is larger than the range of a pixel in Linf (the widest
        channel's). The values of a tensor are not read."""
        if self.norm != "linf" or alpha is None or isinstance(alpha, Tensor):
            return
        low, high = widest_range(self.low, self.high)
        for size in alpha if isinstance(alpha, tuple) else (alpha,):
            if size > high - low:
                raise UserError(
                    f"alpha={size:g} is more than the whole range of a pixel, [{low:g}, "
                    f"{high:g}]; did you mean {size:g}/255?"
                )

    @property
    def pgd_alpha(self) -> Radius:
        """The step size of PGD in the papers: eps/4 in Linf (2/255 at 8/255), 15/128 eps in L2
        (15/255 at 128/255; locuslab/robust_overfitting); a number, tuple or tensor as eps is."""
        factor = 1 / 4 if self.norm == "linf" else 15 / 128
        return self.of_eps(factor) if isinstance(self.eps, tuple) else self.eps * factor

    def of_eps(self, factor: float) -> Radius:
        """``factor`` times eps; a number, tuple or tensor as eps is."""
        if isinstance(self.eps, tuple):
            return tuple(eps * factor for eps in self.eps)
        return self.eps * factor

    def radius(self, x: Tensor) -> float | Tensor:
        """eps as it multiplies images ``x`` (B,C,...): a number, or a tensor that is 0-dim,
        (B,1,1,1) or (1,C,1,1)."""
        return beside("eps", self.eps, x)

    def ends(self, x: Tensor) -> tuple[Any, Any]:
        """low and high as they compare with ``x`` (B,C,...): numbers, or tensors (1,C,1,1) of its
        type."""
        if not self._boxed_by_channel:
            return self.low, self.high
        low, high = (each(value, x.shape[1]) for value in (self.low, self.high))
        return as_channels("low", low, x, x.dtype), as_channels("high", high, x, x.dtype)

    def clip(self, x: Tensor) -> Tensor:
        """``x`` (B,C,...) clipped to the box."""
        return x.clamp(*self.ends(x))

    def masked(self, moved: Tensor, x: Tensor) -> Tensor:
        """``moved`` (B,C,H,W), with the values of ``x`` at the pixels that may not move."""
        return moved if self.mask is None else torch.where(fitting(self.mask, x), moved, x)

    def movable(self, perturbation: Tensor) -> Tensor:
        """``perturbation`` (B,C,H,W), with 0 at the pixels that may not move."""
        if self.mask is None:
            return perturbation
        return torch.where(fitting(self.mask, perturbation), perturbation, 0.0)

    @property
    def widest(self) -> float:
        """The largest eps that makes sense: the range of a pixel in Linf, no bound in L2."""
        if self.norm == "l2":
            return inf
        low, high = widest_range(self.low, self.high)
        return high - low

    def start(
        self, x: Tensor, index: Tensor, seed: int, offset: Tensor | int, stream: int = 0
    ) -> Tensor:
        """A random point of the ball around ``x`` (B,C,H,W), clipped to the box.

        Linf: uniform in the cube. L2: a Gaussian direction with a radius uniform in [0, eps]
        (not uniform in the ball; locuslab/robust_overfitting). Sample ``index[i]`` draws the same
        numbers in every batch; ``offset`` is the number of the draw.
        """
        key = (seed, offset)
        if self.norm == "l2":
            if self.mask is not None:
                moved = self._masked_l2_start(x, index, *key, stream)
            else:
                moved = kernels.l2_start(x, self.eps, index, *key, *self._box, stream)
        elif isinstance(self.eps, tuple):
            wide = x.to(compute_dtype(x.dtype))
            noise = kernels.noise_uniform(index, x.shape[1:], *key, stream, wide.dtype)
            moved = self.clip((wide + noise * self.radius(x)).to(x.dtype))
        else:
            moved = kernels.linf_start(x, self.eps, index, *key, *self._box, stream)
        return self._finished(moved, x)

    def step(self, x_adv: Tensor, gradient: Tensor, x: Tensor, alpha: Radius) -> Tensor:
        """One ascent step of size ``alpha``, projected to the ball around ``x`` and the box.

        Linf uses the sign of ``gradient``, L2 each sample's gradient divided by its norm; a zero
        gradient moves nothing. ``alpha`` is a number, a tensor that is 0-dim or (B,), or in Linf a
        number for each channel: a tuple, or a tensor (1,C,1,1).
        """
        # A number is passed without a call.
        per_channel = isinstance(alpha, (Tensor, tuple)) and is_by_channel(alpha)
        if self._one_kernel and not per_channel:
            move: Any = kernels.linf_step if self.norm == "linf" else kernels.l2_step
            moved: Tensor = move(x_adv, gradient, x, alpha, self.eps, self.low, self.high)
            return moved
        if self.norm == "l2":
            if self.mask is not None:
                movable = fitting(self.mask, x)
                gradient = torch.where(movable, gradient, 0.0)
                x_adv = torch.where(movable, x_adv, x)
            moved = kernels.l2_step(x_adv, gradient, x, alpha, self.eps, *self._box)
        elif isinstance(self.eps, tuple) or per_channel:
            wide = compute_dtype(x.dtype)
            # A gradient that is not finite gives NaN, as in the kernels.
            direction = (gradient.sign() + (gradient - gradient)).to(wide)
            moved = direction * beside("alpha", alpha, x) + x_adv
            moved = self._into_cube(moved, x, x_adv.dtype)
        else:
            moved = kernels.linf_step(x_adv, gradient, x, alpha, self.eps, *self._box)
        return self._finished(moved, x)

    def project(self, x_adv: Tensor, x: Tensor) -> Tensor:
        """``x_adv`` projected to the ball around ``x`` and clipped to the box."""
        if self.norm == "l2":
            if self.mask is not None:
                x_adv = torch.where(fitting(self.mask, x), x_adv, x)
            moved = kernels.l2_project(x_adv, x, self.eps, *self._box)
        elif isinstance(self.eps, tuple):
            moved = self._into_cube(x_adv.to(compute_dtype(x.dtype)), x, x_adv.dtype)
        else:
            moved = kernels.linf_project(x_adv, x, self.eps, *self._box)
        return self._finished(moved, x)

    def unmoved(self, x_adv: Tensor, start: Tensor, x: Tensor) -> Tensor:
        """(B,) bool: an attack in the ball around ``x`` that began at ``start``, clipped to the
        box, ended where it began, and not because all steps point out of the ball there."""
        if self.norm == "linf" and self._one_kernel:
            unmoved: Any = kernels.unmoved_images
            found: Tensor = unmoved(x_adv, start, x, self.eps, self.low, self.high)
            return found
        start = self.clip(start)
        return (x_adv == start).flatten(1).all(1) & ~self.at_edge(start, x)

    def at_edge(self, x_adv: Tensor, x: Tensor) -> Tensor:
        """(B,) bool: the gradient may only point out of the ball around ``x``. In Linf no pixel can
        move in both directions, and at least one is at the distance eps. True for an image whose
        mask lets no pixel move."""
        away, low, high = x_adv - x, *self.ends(x)
        if self.mask is not None:
            away = torch.where(fitting(self.mask, x), away, 0.0)
        radius = self.radius(x)
        if isinstance(radius, Tensor):
            radius = radius.to(x.dtype)  # compared as a number is
        if self.norm == "l2":
            # Clipping to the box after the projection leaves some points inside the radius.
            length = torch.linalg.vector_norm(away.flatten(1), dim=1)
            edge = length >= 0.9 * (radius.flatten() if isinstance(radius, Tensor) else radius)
            return edge if self.mask is None else edge | ~self.mask.flatten(1).any(1)
        out = away.abs() >= radius * (1 - EDGE)
        stuck = out | (x_adv <= low) | (x_adv >= high)
        if self.mask is None:
            return out.flatten(1).any(1) & stuck.flatten(1).all(1)
        out, stuck = out & self.mask, stuck | ~self.mask
        some = out.flatten(1).any(1) | ~self.mask.flatten(1).any(1)
        return some & stuck.flatten(1).all(1)

    @property
    def by_channel(self) -> bool:
        """True if eps or the box has a number for each channel, which no kernel takes."""
        return isinstance(self.eps, tuple) or self._boxed_by_channel

    @property
    def _boxed_by_channel(self) -> bool:
        return isinstance(self.low, tuple) or isinstance(self.high, tuple)

    @property
    def _box(self) -> tuple[float, float]:
        """The box for a kernel; an infinite one if ``clip`` is called after it."""
        if isinstance(self.low, tuple) or isinstance(self.high, tuple):
            return -inf, inf
        return self.low, self.high

    def _masked_l2_start(
        self, x: Tensor, index: Tensor, seed: int, offset: Tensor | int, stream: int
    ) -> Tensor:
        wide = compute_dtype(x.dtype)
        drawn = kernels.noise_normal(index, x.shape[1:], seed, offset, stream, wide)
        direction = torch.where(fitting(self.mask, x), drawn, 0.0)
        # A step of that length along the noise is the start; no ball is in its way.
        reach = sample_radius(index, seed, offset, stream).to(wide) * self.eps
        return kernels.l2_step(x, direction, x, reach, inf, *self._box)

    def _into_cube(self, moved: Tensor, x: Tensor, dtype: torch.dtype) -> Tensor:
        """``moved`` inside the ball of eps per channel and the box, in ``dtype``."""
        center, radius = x.to(moved.dtype), self.radius(x)
        return self.clip(moved.clamp(center - radius, center + radius).to(dtype))

    def _finished(self, moved: Tensor, x: Tensor) -> Tensor:
        """``moved`` by a kernel, clipped where the kernel could not, and x where nothing moves."""
        if self._boxed_by_channel:
            moved = self.clip(moved)
        return moved if self.mask is None else torch.where(fitting(self.mask, x), moved, x)
