"""PyTorch's functions as ``__torch_function__`` gets them, by what they do with a tensor."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

_T: Any = Tensor


def _getters(*names: str) -> list[Any]:
    return [getattr(Tensor, name).__get__ for name in names if hasattr(Tensor, name)]


RELU: list[Any] = [
    *(functional.relu, functional.relu_, torch.relu, torch.relu_, _T.relu, _T.relu_),
]
ADD: list[Any] = [torch.add, _T.add, _T.__add__, _T.__radd__, _T.add_, _T.__iadd__]
IN_PLACE = frozenset({functional.relu_, torch.relu_, _T.relu_, _T.add_, _T.__iadd__})
"""Those of ``RELU`` and ``ADD`` that change their first argument."""

METADATA: list[Any] = [
    *(_T.size, _T.dim, _T.ndimension, _T.numel, _T.nelement, _T.stride, _T.storage_offset),
    *(_T.element_size, _T.is_contiguous, _T.is_floating_point, _T.is_complex, _T.is_inference),
    *(_T.get_device, _T.__len__, _T.__hash__, _T.dim_order, torch.numel),
    *(torch.is_floating_point, torch.is_complex, torch.is_inference),
    *_getters("shape", "dtype", "device", "ndim", "layout", "requires_grad", "is_leaf", "is_cuda"),
    *_getters("is_cpu", "is_sparse", "is_quantized", "is_meta", "is_nested", "is_mkldnn"),
    *_getters("itemsize", "nbytes", "names", "_version", "output_nr", "grad"),
    _T.grad.__set__,
]
"""They need no values."""

HISTORY: list[Any] = [_T.register_hook, _T.retain_grad, *_getters("grad_fn", "retains_grad")]
"""They want the gradient for the tensor."""

RECORD: list[Any] = [_T._backward_hooks.__get__, _T._backward_hooks.__set__]
"""Autograd's own."""

_AUGMENTED = (
    *("add", "sub", "mul", "div", "truediv", "floordiv", "mod", "pow", "and", "or", "xor"),
    *("lshift", "rshift"),
)
_CHANGES = frozenset({f"__i{name}__" for name in _AUGMENTED} | {"__setitem__", "__set__"})


def changes_first(func: Any, kwargs: dict[str, Any]) -> bool:
    """True if ``func`` changes its first argument in place."""
    name = getattr(func, "__name__", "").partition(".")[0]
    named = name.endswith("_") and not name.endswith("__")
    return named or name in _CHANGES or kwargs.get("inplace") is True
