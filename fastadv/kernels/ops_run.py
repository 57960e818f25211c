"""What each registered operator runs: the arguments of its schema put together again."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .choice import call


def _either(value: Any, tensor: Tensor | None) -> Any:
    return value if tensor is None else tensor


def _like(result: Tensor, model: Tensor) -> Tensor:
    """``result`` in the layout that the fake promises."""
    promised = torch.empty_like(model, device="meta")
    if result.stride() == promised.stride():
        return result
    return torch.empty_like(model, dtype=result.dtype).copy_(result)


def _noise(name: str) -> Callable[..., Tensor]:
    def run(
        index: Tensor, shape: Sequence[int], s: int, st: Tensor | None, o: int, ot: Tensor | None,
        stream: int, dtype: torch.dtype,
    ) -> Tensor:  # fmt: skip
        seed, offset = _either(s, st), _either(o, ot)
        drawn: Tensor = call(name, index, shape, seed, offset, stream, dtype)
        return drawn.contiguous()

    return run


def _start(name: str) -> Callable[..., Tensor]:
    def run(
        x: Tensor, eps: float, index: Tensor, s: int, st: Tensor | None, o: int, ot: Tensor | None,
        low: float, high: float, stream: int,
    ) -> Tensor:  # fmt: skip
        seed, offset = _either(s, st), _either(o, ot)
        return _like(call(name, x, eps, index, seed, offset, low, high, stream), x)

    return run


def _step(name: str) -> Callable[..., Tensor]:
    def run(
        x_adv: Tensor, grad: Tensor, x: Tensor, a: float, at: Tensor | None, eps: float,
        low: float, high: float,
    ) -> Tensor:  # fmt: skip
        return _like(call(name, x_adv, grad, x, _either(a, at), eps, low, high), x_adv)

    return run


def _linf_step_out(
    x_adv: Tensor, grad: Tensor, x: Tensor, a: float, at: Tensor | None, eps: float,
    low: float, high: float, out: Tensor,
) -> None:  # fmt: skip
    call("linf_step", x_adv, grad, x, _either(a, at), eps, low, high, out)


def _project(name: str) -> Callable[..., Tensor]:
    def run(x_adv: Tensor, x: Tensor, eps: float, low: float, high: float) -> Tensor:
        return _like(call(name, x_adv, x, eps, low, high), x_adv)

    return run


def _perturb_weights(
    weights: list[Tensor], directions: list[Tensor], g: float, gt: Tensor | None, scope: str
) -> None:
    call("perturb_weights", weights, directions, _either(g, gt), scope)


def _restore_weights(weights: list[Tensor], originals: list[Tensor], v: list[Tensor]) -> None:
    call("restore_weights", weights, originals, v)


def _top_n_sum(z: Tensor, z_adv: Tensor, n: int) -> tuple[Tensor, Tensor]:
    total, kept = call("top_n_forward", z, z_adv, n, True)
    return total, kept.contiguous()


def _crop_flip(
    store: Tensor, index: Tensor, top: Tensor, left: Tensor, flip: Tensor, h: int, w: int,
    dtype: torch.dtype, fill: float, padding: str, channels_last: bool,
) -> Tensor:  # fmt: skip
    view = (store, index, top, left, flip)
    window: Tensor = call(
        "crop_flip", *view, (h, w), dtype, fill=fill, padding=padding, channels_last=channels_last
    )
    return window


def _crop_flip_add(
    store: Tensor, index: Tensor, top: Tensor, left: Tensor, flip: Tensor, x: Tensor, s: float,
    st: Tensor | None, eps: float, low: float, high: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    view = (store, index, top, left, flip)
    start, window = call("crop_flip_add", *view, x, _either(s, st), eps, low, high)
    return _like(start, x), _like(window, x)


def _crop_flip_write(
    store: Tensor, index: Tensor, top: Tensor, left: Tensor, flip: Tensor, window: Tensor,
    ok: Tensor | None,
) -> None:  # fmt: skip
    call("crop_flip_write", store, index, top, left, flip, window, ok)


def _crop_flip_ascend(
    store: Tensor, index: Tensor, top: Tensor, left: Tensor, flip: Tensor, grad: Tensor,
    r: float, rt: Tensor | None, low: float, high: float, ok: Tensor | None,
) -> None:  # fmt: skip
    view = (store, index, top, left, flip)
    call("crop_flip_ascend", *view, grad, _either(r, rt), low, high, ok)


IMPLEMENTATIONS: dict[str, Callable[..., Any]] = {
    "noise_uniform": _noise("noise_uniform"),
    "noise_normal": _noise("noise_normal"),
    "linf_start": _start("linf_start"),
    "l2_start": _start("l2_start"),
    "linf_step": _step("linf_step"),
    "linf_step_out": _linf_step_out,
    "l2_step": _step("l2_step"),
    "linf_project": _project("linf_project"),
    "l2_project": _project("l2_project"),
    "perturb_weights": _perturb_weights,
    "restore_weights": _restore_weights,
    "top_n_sum": _top_n_sum,
    "crop_flip": _crop_flip,
    "crop_flip_add": _crop_flip_add,
    "crop_flip_write": _crop_flip_write,
    "crop_flip_ascend": _crop_flip_ascend,
}
