"""What each registered operator returns, without computing it: shapes, dtypes and layouts."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .reference import compute_dtype


def _fake_first(first: Tensor, *_rest: object) -> Tensor:
    return torch.empty_like(first)


def _fake_nothing(*_args: object) -> None:
    return None


def _fake_noise(index: Tensor, shape: Sequence[int], *rest: Any) -> Tensor:
    return index.new_empty((index.shape[0], *shape), dtype=rest[-1])


def _fake_top_n(z: Tensor, _z_adv: Tensor, _n: int) -> tuple[Tensor, Tensor]:
    total = z.new_empty((), dtype=compute_dtype(z.dtype))
    return total, z.new_empty(z.shape, dtype=torch.int8)


def _fake_crop(store: Tensor, index: Tensor, *rest: Any) -> Tensor:
    h, w, dtype = rest[3:6]
    layout = torch.channels_last if rest[-1] else torch.contiguous_format
    shape = (index.shape[0], store.shape[1], h, w)
    return torch.empty(shape, dtype=dtype, device=store.device, memory_format=layout)


def _fake_crop_add(
    _store: Tensor, _i: Tensor, _t: Tensor, _l: Tensor, _f: Tensor, x: Tensor, *_rest: object
) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x), torch.empty_like(x)


FAKES: dict[str, Callable[..., Any]] = {
    "noise_uniform": _fake_noise,
    "noise_normal": _fake_noise,
    "linf_start": _fake_first,
    "l2_start": _fake_first,
    "linf_step": _fake_first,
    "linf_step_out": _fake_nothing,
    "l2_step": _fake_first,
    "linf_project": _fake_first,
    "l2_project": _fake_first,
    "perturb_weights": _fake_nothing,
    "restore_weights": _fake_nothing,
    "top_n_sum": _fake_top_n,
    "crop_flip": _fake_crop,
    "crop_flip_add": _fake_crop_add,
    "crop_flip_write": _fake_nothing,
    "crop_flip_ascend": _fake_nothing,
}
