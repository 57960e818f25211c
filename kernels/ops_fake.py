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


def _fake_normalized(x_adv: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    normalized = torch.empty_like(x_adv, dtype=rest[-1], memory_format=torch.channels_last)
    return torch.empty_like(x_adv), normalized


def _fake_top_n(z: Tensor, _z_adv: Tensor, _n: int) -> tuple[Tensor, Tensor]:
    total = z.new_empty((), dtype=compute_dtype(z.dtype))
    return total, z.new_empty(z.shape, dtype=torch.int8)


def _fake_crop(store: Tensor, index: Tensor, *rest: Any) -> Tensor:
    h, w, dtype = rest[3:6]
    return store.new_empty((index.shape[0], store.shape[1], h, w), dtype=dtype)


def _fake_crop_add(
    _store: Tensor, _i: Tensor, _t: Tensor, _l: Tensor, _f: Tensor, x: Tensor, *_rest: object
) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), x.new_empty(x.shape)


def _fake_kl(logits_p: Tensor, _logits_q: Tensor) -> Tensor:
    return logits_p.new_empty(logits_p.shape[0], dtype=compute_dtype(logits_p.dtype))


def _fake_kl_backward(
    _grad: Tensor, p: Tensor, q: Tensor, want_p: bool, want_q: bool
) -> tuple[Tensor, Tensor]:
    return p.new_empty(p.shape if want_p else (0,)), q.new_empty(q.shape if want_q else (0,))


def _fake_ce(logits: Tensor, y: Tensor, *_rest: object) -> tuple[Tensor, Tensor, Tensor]:
    total = logits.new_empty((), dtype=compute_dtype(logits.dtype))
    return total, y.new_empty((), dtype=torch.int64), y.new_empty(y.shape, dtype=torch.int8)


def _fake_ce_backward(_grad: Tensor, logits: Tensor, _y: Tensor, _kept: Tensor) -> Tensor:
    return logits.new_empty(logits.shape)


def _fake_list(tensors: list[Tensor], *_rest: object) -> list[Tensor]:
    return [torch.empty_like(t) for t in tensors]


def _fake_step_gradients(gradients: list[Tensor], _signs: list[Tensor]) -> Tensor:
    first = gradients[0]
    return first.new_empty(len(gradients), dtype=compute_dtype(first.dtype))


FAKES: dict[str, Callable[..., Any]] = {
    "noise_uniform": _fake_noise,
    "noise_normal": _fake_noise,
    "linf_start": _fake_first,
    "l2_start": _fake_first,
    "linf_step": _fake_first,
    "linf_step_out": _fake_nothing,
    "linf_step_normalized": _fake_normalized,
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
    "trades_kl": _fake_kl,
    "trades_kl_backward": _fake_kl_backward,
    "masked_ce": _fake_ce,
    "masked_ce_backward": _fake_ce_backward,
    "block_signs": _fake_list,
    "block_noise": _fake_list,
    "block_step_gradients": _fake_step_gradients,
}
