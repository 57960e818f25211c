"""Which number type a pass computes in, and when a machine cannot do what was asked."""

from __future__ import annotations

import platform
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch

from fastadv.errors import unknown

NAMES = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}


@cache
def cpu_multiplies(dtype: torch.dtype) -> bool:
    """Whether this CPU has instructions for products of ``dtype`` (AVX-512 BF16, AMX, ARM's)."""
    if dtype is torch.float16:
        return bool(torch.ops.mkldnn._is_mkldnn_fp16_supported())
    has = bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    if platform.machine().lower() in {"x86_64", "amd64"}:
        # oneDNN calls any AVX-512 machine able, and then emulates: slower than float32.
        has = has and torch.cpu._is_avx512_bf16_supported()
    return has


@cache
def _say_once(sentence: str) -> None:
    warnings.warn(sentence, stacklevel=4)


def pass_dtype(name: str, device: torch.device) -> torch.dtype | None:
    """The autocast dtype for ``name`` (fp32, bf16, fp16) on ``device``; None means float32.

    A CPU without instructions for it computes in float32, and says so once.
    """
    if name not in NAMES:
        raise unknown("precision", name, NAMES)
    dtype = NAMES[name]
    if dtype is None or device.type != "cpu" or cpu_multiplies(dtype):
        return dtype
    _say_once(f"This CPU has no {name} instructions; computing in float32 instead.")
    return None


@contextmanager
def autocast(device: torch.device, dtype: torch.dtype | None) -> Iterator[None]:
    """Autocast to ``dtype`` without the weight cache; None switches autocast off.

    Autocast's cache keeps the low-precision copy of a weight until the outermost region ends, so
    weights changed in place (AWP, RWP) would silently be ignored.
    """
    with torch.autocast(
        device.type, dtype=dtype or torch.bfloat16, enabled=dtype is not None, cache_enabled=False
    ):
        yield


def shown(dtype: torch.dtype | None, model: torch.nn.Module, device: torch.device) -> str:
    """The precision of passes with autocast to ``dtype`` (None: the model's own), in words."""
    if dtype is not None:
        return str(dtype).removeprefix("torch.")
    own = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
    words = str(own).removeprefix("torch.")
    if own is not torch.float32 or device.type != "cuda":
        return words
    if torch.backends.cuda.matmul.allow_tf32:
        return f"{words} (TF32)"
    return f"{words} (convolutions in TF32)" if torch.backends.cudnn.allow_tf32 else words


@contextmanager
def tf32(allowed: bool | None) -> Iterator[None]:
    """Whether float32 convolutions and products on a GPU may round to TF32; None: torch's own
    setting (its default: convolutions may, matrix products may not)."""
    if allowed is None:
        yield
        return
    cudnn: Any = torch.backends.cudnn
    products: Any = torch.backends.cuda.matmul
    # The older of torch's two interfaces writes a value that both can read, but turns "none", which
    # is part of a compiler's key, into another; so the newer one's values are what is put back.
    kept = [
        (place, place.fp32_precision)
        for place in (cudnn, cudnn.conv, cudnn.rnn, products)
        if hasattr(place, "fp32_precision")
    ]
    before = cudnn.allow_tf32, products.allow_tf32
    cudnn.allow_tf32 = products.allow_tf32 = allowed
    try:
        yield
    finally:
        cudnn.allow_tf32, products.allow_tf32 = before
        for place, precision in kept:
            if place.fp32_precision != precision:
                place.fp32_precision = precision


def surrounding(device: torch.device) -> torch.dtype | None:
    """The dtype of the autocast region the caller is in, or None."""
    if torch.is_autocast_enabled(device.type):
        return torch.get_autocast_dtype(device.type)
    return None
