"""Digests of numbers, strings, dicts, lists and tensors; values of different types differ."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor

_CHUNK = 1 << 24  # bytes hashed by one thread


def digest(value: Any) -> str:
    """32 hex digits; two values share them only if types, order and every bit are equal.

    Every item is hashed as type, length and content, so two different trees give two streams.
    Dicts are read in their order, tensors as shape, strides, dtype and elements. Raises
    ``TypeError`` for anything but None, bool, int, float, str, bytes, dict, list, tuple, tensor.
    """
    hasher = hashlib.sha256()  # most processors have instructions for it
    _feed(hasher, value)
    return str(hasher.hexdigest()[:32])


def _feed(hasher: Any, value: Any) -> None:
    if isinstance(value, Mapping):
        _head(hasher, "dict", len(value))
        for key, item in value.items():
            _feed(hasher, key)
            _feed(hasher, item)
    elif isinstance(value, (list, tuple)):
        _head(hasher, "list" if isinstance(value, list) else "tuple", len(value))
        for item in value:
            _feed(hasher, item)
    elif isinstance(value, Tensor):
        _feed_tensor(hasher, value)
    elif isinstance(value, bytes):
        _head(hasher, "bytes", len(value))
        hasher.update(value)
    elif value is None or isinstance(value, (bool, int, float, str)):
        # float.hex keeps every bit of the number; repr would too, but not of every subclass.
        plain = value.hex() if isinstance(value, float) else str(value)
        content = plain.encode("utf-8", "surrogatepass")
        kinds = (bool, int, float, str)
        kind = next((kind.__name__ for kind in kinds if isinstance(value, kind)), "none")
        _head(hasher, kind, len(content))
        hasher.update(content)
    else:
        raise TypeError(f"no digest of a {type(value).__name__}")


def _head(hasher: Any, kind: str, length: int) -> None:
    hasher.update(f"{kind}:{length};".encode())


def _feed_tensor(hasher: Any, value: Tensor) -> None:
    plain = value.detach().cpu()
    head = f"{plain.dtype}{tuple(plain.shape)}{plain.stride()}".encode()
    _head(hasher, "tensor", len(head))
    hasher.update(head)
    content = plain.contiguous().reshape(-1).view(torch.uint8).numpy().data
    if len(content) <= _CHUNK:
        hasher.update(content)
        return
    # hashlib releases the GIL, so the chunks of a large data set are hashed on all cores.
    parts = [content[start : start + _CHUNK] for start in range(0, len(content), _CHUNK)]
    with ThreadPoolExecutor() as threads:
        for part in threads.map(lambda part: hashlib.sha256(part).digest(), parts):
            hasher.update(part)
