"""The number type of a pass, and the fallback for a machine that does not support it."""

from __future__ import annotations

import platform
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import cache
from typing import Any

import torch

from fastadv.errors import unknown, warn

DTYPES = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}


@cache
def cpu_multiplies(dtype: torch.dtype) -> bool:
    """True if this CPU has instructions for products of ``dtype`` (AVX-512 BF16, AMX, or ARM)."""
    if dtype is torch.float16:
        return bool(torch.ops.mkldnn._is_mkldnn_fp16_supported())
    has = bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    if platform.machine().lower() in {"x86_64", "amd64"}:
        # oneDNN reports support on any AVX-512 machine and may emulate it, slower than float32.
        has = has and torch.cpu._is_avx512_bf16_supported()
    return has


@cache
def _say_once(sentence: str) -> None:
    warn(sentence)


def pass_dtype(name: str, device: torch.device) -> torch.dtype | None:
    """The autocast dtype for ``name`` (fp32, bf16, fp16) on ``device``; None means float32.

    A CPU without instructions for it computes in float32, with one warning. Raises ``UserError``
    for an unknown name.
    """
    if not isinstance(name, str) or name not in DTYPES:
        raise unknown("precision", name, DTYPES)
    dtype = DTYPES[name]
    if dtype is None or device.type != "cpu" or cpu_multiplies(dtype):
        return dtype
    _say_once(f"This CPU has no {name} instructions; computing in float32 instead.")
    return None


def autocast(device: torch.device, dtype: torch.dtype | None) -> AbstractContextManager[Any]:
    """Autocast to ``dtype`` without the weight cache; None switches autocast off.

    Autocast's cache keeps the low-precision copy of a weight until the outermost autocast context
    ends, so changes of the weights in place (AWP, RWP) would silently be ignored.
    """
    if dtype is None and not torch.is_autocast_enabled(device.type):
        return nullcontext()
    return torch.autocast(
        device.type, dtype=dtype or torch.bfloat16, enabled=dtype is not None, cache_enabled=False
    )


def shown(dtype: torch.dtype | None, model: torch.nn.Module, device: torch.device) -> str:
    """The precision of passes with autocast to ``dtype`` (None: the model's own type), in words."""
    if dtype is not None:
        return str(dtype).removeprefix("torch.")
    own = _own_type(model)
    words = str(own).removeprefix("torch.")
    if own is not torch.float32 or device.type != "cuda":
        return words
    products, convolutions = torch.backends.cuda.matmul, torch.backends.cudnn
    if _rounds(products, products):
        return f"{words} (TF32)"
    rounds = _rounds(convolutions, getattr(convolutions, "conv", None))
    return f"{words} (convolutions in TF32)" if rounds else words


def rounding(dtype: torch.dtype | None, model: torch.nn.Module, device: torch.device) -> float:
    """The distance of 1 from the next number in passes with autocast to ``dtype`` (None: the
    model's own type)."""
    own = _own_type(model) if dtype is None else dtype
    if "TF32" in shown(dtype, model, device):
        own = torch.float16  # with as many bits behind the point
    return torch.finfo(own).eps


def _own_type(model: torch.nn.Module) -> torch.dtype:
    return next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)


def _rounds(older: Any, newer: Any) -> bool:
    """True if TF32 is allowed, from the one of torch's two interfaces that can be read."""
    allowed = _told(lambda: older.allow_tf32)
    return newer.fp32_precision == "tf32" if allowed is None else bool(allowed)


def _told(ask: Callable[[], Any]) -> Any:
    """The value from the older interface, or None if it raises, since it cannot express a setting
    of the newer one."""
    try:
        return ask()
    except RuntimeError:
        return None


@cache
def _places() -> list[Any]:
    """The objects of the newer interface whose settings the older one also writes; parents
    first."""
    cudnn: Any = torch.backends.cudnn
    onednn = getattr(torch.backends, "mkldnn", None)
    found = [cudnn, getattr(cudnn, "conv", None), getattr(cudnn, "rnn", None)]
    found += [torch.backends.cuda.matmul, getattr(onednn, "matmul", None)]
    return [place for place in found if hasattr(place, "fp32_precision")]


def float32_settings() -> tuple[Any, ...]:
    """The settings that decide how float32 products and convolutions round."""
    older = torch._C._get_cudnn_allow_tf32, torch.get_float32_matmul_precision
    return (*map(_told, older), *(place.fp32_precision for place in _places()))


@contextmanager
def tf32(allowed: bool | None) -> Iterator[None]:
    """Within this context float32 convolutions and products on a GPU may round to TF32 (True) or
    not (False). None keeps torch's own setting, by default: convolutions may, matrix products may
    not."""
    if allowed is None:
        yield
        return
    cudnn: Any = torch.backends.cudnn
    products: Any = torch.backends.cuda.matmul
    # Both interfaces can read what the older one writes. Once the newer one has been used, the
    # older one may raise. The older one also overwrites "none", which is part of a compiler's key.
    convolving = _told(lambda: cudnn.allow_tf32)
    multiplying = _told(torch.get_float32_matmul_precision)
    kept = [(place, place.fp32_precision) for place in _places()]
    if convolving is not None:
        cudnn.allow_tf32 = allowed
    if multiplying is not None:
        products.allow_tf32 = allowed
    newer: list[Any] = [getattr(cudnn, "conv", None), getattr(cudnn, "rnn", None), products]
    for place in newer:
        # For False the older interface writes "none", which follows the setting for all of torch.
        if hasattr(place, "fp32_precision") and (place.fp32_precision == "tf32") != allowed:
            place.fp32_precision = "tf32" if allowed else "ieee"
    try:
        yield
    finally:
        if convolving is not None:
            cudnn.allow_tf32 = convolving
        if multiplying is not None:
            torch.set_float32_matmul_precision(multiplying)
        for place, precision in kept:
            _put_back(place, precision)


def _put_back(place: Any, precision: str) -> None:
    """Restore the setting of ``place``. One that followed another setting ("none") must follow it
    again, not only equal it. (The state of cuDNN's settings before they are first set cannot be
    restored through torch.)"""
    place.fp32_precision = "none"
    if place.fp32_precision != precision:
        place.fp32_precision = precision


def surrounding(device: torch.device) -> torch.dtype | None:
    """The dtype of the caller's autocast context, or None."""
    if torch.is_autocast_enabled(device.type):
        return torch.get_autocast_dtype(device.type)
    return None
