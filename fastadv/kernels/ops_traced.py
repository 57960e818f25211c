"""The public functions over the registered operators, for a compiler that traces them."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from . import ops
from .reference_crop import Padding, default_dtype

Number = float | Tensor
Wide = int | Tensor

_OPS = ops.OPERATORS


def _split(value: Any) -> tuple[Any, Tensor | None]:
    return (0, value) if isinstance(value, Tensor) else (value, None)


def _split_float(value: Number) -> tuple[float, Tensor | None]:
    return (0.0, value) if isinstance(value, Tensor) else (float(value), None)


def _split_key(seed: Wide, offset: Wide) -> tuple[Any, ...]:
    return (*_split(_signed(seed)), *_split(_signed(offset)))


def _signed(value: Wide) -> Wide:
    """A schema's int has 64 signed bits."""
    return value if isinstance(value, Tensor) else (value + 2**63) % 2**64 - 2**63


def _noise(name: str) -> Callable[..., Tensor]:
    def traced(
        index: Tensor, shape: Sequence[int], seed: Wide, offset: Wide, stream: int = 0,
        dtype: torch.dtype = torch.float32,
    ) -> Tensor:  # fmt: skip
        key = _split_key(seed, offset)
        drawn: Tensor = getattr(_OPS, name)(index, shape, *key, stream, dtype)
        return drawn

    return traced


def _start(name: str) -> Callable[..., Tensor]:
    @torch.no_grad()
    def traced(
        x: Tensor, eps: float, index: Tensor, seed: Wide, offset: Wide,
        low: float = 0.0, high: float = 1.0, stream: int = 0,
    ) -> Tensor:  # fmt: skip
        key = _split_key(seed, offset)
        drawn: Tensor = getattr(_OPS, name)(x, eps, index, *key, low, high, stream)
        return drawn

    return traced


@torch.no_grad()
def _linf_step(
    x_adv: Tensor, grad: Tensor, x: Tensor, alpha: Number, eps: float,
    low: float = 0.0, high: float = 1.0, out: Tensor | None = None,
) -> Tensor:  # fmt: skip
    step = (x_adv, grad, x, *_split_float(alpha), eps, low, high)
    if out is None:
        result: Tensor = _OPS.linf_step(*step)
        return result
    _OPS.linf_step_out(*step, out)
    return out


@torch.no_grad()
def _l2_step(
    x_adv: Tensor, grad: Tensor, x: Tensor, alpha: Number, eps: float,
    low: float = 0.0, high: float = 1.0,
) -> Tensor:  # fmt: skip
    result: Tensor = _OPS.l2_step(x_adv, grad, x, *_split_float(alpha), eps, low, high)
    return result


def _project(name: str) -> Callable[..., Tensor]:
    @torch.no_grad()
    def traced(
        x_adv: Tensor, x: Tensor, eps: float, low: float = 0.0, high: float = 1.0
    ) -> Tensor:  # fmt: skip
        result: Tensor = getattr(_OPS, name)(x_adv, x, eps, low, high)
        return result

    return traced


@torch.no_grad()
def _perturb_weights(
    weights: Sequence[Tensor], directions: Sequence[Tensor], gamma: Number, scope: str = "tensor"
) -> None:  # fmt: skip
    _OPS.perturb_weights(list(weights), list(directions), *_split_float(gamma), scope)


@torch.no_grad()
def _restore_weights(
    weights: Sequence[Tensor], originals: Sequence[Tensor], v: Sequence[Tensor]
) -> None:  # fmt: skip
    _OPS.restore_weights(list(weights), list(originals), list(v))


def _top_n_sum(z: Tensor, z_adv: Tensor, n: int) -> Tensor:
    total: Tensor = _OPS.top_n_sum(z, z_adv, n)[0]
    return total


@torch.no_grad()
def _crop_flip(
    store: Tensor, index: Tensor, top: Tensor, left: Tensor, flip: Tensor, size: tuple[int, int],
    dtype: torch.dtype | None = None, *, fill: float = 0.0, padding: Padding = "constant",
    channels_last: bool = False,
) -> Tensor:  # fmt: skip
    view, kind = (store, index, top, left, flip), dtype or default_dtype(store)
    window: Tensor = _OPS.crop_flip(*view, *size, kind, fill, padding, channels_last)
    return window


@torch.no_grad()
def _crop_flip_add(
    store: Tensor, index: Tensor, top: Tensor, left: Tensor, flip: Tensor, x: Tensor,
    scale: Number, eps: float, low: float = 0.0, high: float = 1.0,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    view = (store, index, top, left, flip)
    pair: tuple[Tensor, Tensor] = _OPS.crop_flip_add(*view, x, *_split_float(scale), eps, low, high)
    return pair


@torch.no_grad()
def _crop_flip_write(
    store: Tensor, index: Tensor, top: Tensor, left: Tensor, flip: Tensor, window: Tensor,
    ok: Tensor | None = None,
) -> None:  # fmt: skip
    _OPS.crop_flip_write(store, index, top, left, flip, window, ok)


@torch.no_grad()
def _crop_flip_ascend(
    store: Tensor, index: Tensor, top: Tensor, left: Tensor, flip: Tensor, grad: Tensor,
    rate: Number, low: float = -1.0, high: float = 1.0, ok: Tensor | None = None,
) -> None:  # fmt: skip
    view = (store, index, top, left, flip)
    _OPS.crop_flip_ascend(*view, grad, *_split_float(rate), low, high, ok)


FUNCTIONS: dict[str, Callable[..., Any]] = {
    "crop_flip": _crop_flip,
    "crop_flip_add": _crop_flip_add,
    "crop_flip_ascend": _crop_flip_ascend,
    "crop_flip_write": _crop_flip_write,
    "l2_project": _project("l2_project"),
    "l2_start": _start("l2_start"),
    "l2_step": _l2_step,
    "linf_project": _project("linf_project"),
    "linf_start": _start("linf_start"),
    "linf_step": _linf_step,
    "noise_normal": _noise("noise_normal"),
    "noise_uniform": _noise("noise_uniform"),
    "perturb_weights": _perturb_weights,
    "restore_weights": _restore_weights,
    "top_n_sum": _top_n_sum,
}
