"""Replaces a convolution that corrupts memory on a CPU in training passes.

oneDNN's float32 weight gradient of a strided 1x1 convolution with 2 to 15 input channels writes
outside of its memory for channels_last images and some combinations of batch size and number of
threads (seen with torch 2.13.0 and 2.14.1; ``bench/crashing_convolutions.py`` searches a version of
torch for such shapes). A 1x1 convolution without stride over every s-th pixel is the same.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.overrides import TorchFunctionMode

_SAFE_CHANNELS = 16  # from this number on, and for one channel, oneDNN uses another kernel


def pointwise(modules: Iterable[nn.Module], device: torch.device) -> list[nn.Module]:
    """The modules that ``strides_taken_first`` may have to change: 1x1 convolutions, and modules
    with a weight of such a shape. The result holds as long as modules and parameters stay."""
    if device.type != "cpu":
        return []
    return [
        module
        for module in modules
        if (isinstance(module, nn.Conv2d) and module.kernel_size == (1, 1))
        or any(_is_narrow(p) for p in module._parameters.values() if p is None or not is_lazy(p))
    ]


@contextmanager
def strides_taken_first(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Within this context the strided 1x1 convolutions for which oneDNN may corrupt memory skip
    pixels first. ``modules`` must contain those that ``pointwise`` returns.

    Other convolutions cost nothing. Calls of ``functional.conv2d`` are intercepted only if a module
    other than a plain convolution has a weight of such a shape.
    """
    replaced: list[nn.Module] = []
    watched = False
    try:
        for module in modules:
            if not _is_plain(module):
                watched = watched or any(map(_is_narrow, module._parameters.values()))
            elif _may_break(module):
                # An attribute of the object hides the method of its class.
                vars(module)["_conv_forward"] = partial(_forward, module)
                replaced.append(module)
        with _Watching() if watched else nullcontext():
            yield
    finally:
        for module in replaced:
            del vars(module)["_conv_forward"]


def _is_plain(module: nn.Module) -> TypeGuard[nn.Conv2d]:
    """True for a convolution whose forward is only ``_conv_forward``, whatever computes its
    weight."""
    if not isinstance(module, nn.Conv2d):
        return False
    if "_conv_forward" in vars(module):
        return False
    kind = type(module)
    own = (nn.Conv2d.forward, nn.Conv2d._conv_forward)
    return (kind.forward, kind._conv_forward) == own


def _forward(convolution: nn.Conv2d, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    if weight.dtype is not torch.float32:
        return nn.Conv2d._conv_forward(convolution, x, weight, bias)
    return torch.conv2d(_every(x, convolution.stride), weight, bias)


class _Watching(TorchFunctionMode):
    """Intercepts every call of ``conv2d``, from any module."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        if func is torch.conv2d:
            return _conv2d(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


def _conv2d(
    input: Tensor,  # the names of torch's own signature
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
) -> Tensor:
    strides = (stride, stride) if isinstance(stride, int) else tuple(stride) * (2 // len(stride))
    plain = groups == 1 and padding in (0, (0, 0), [0, 0], (0,), [0], "valid")
    if _is_narrow(weight) and weight.dtype is torch.float32 and max(strides) > 1 and plain:
        return torch.conv2d(_every(input, strides), weight, bias)
    return torch.conv2d(input, weight, bias, stride, padding, dilation, groups)


def _may_break(convolution: nn.Conv2d) -> bool:
    unpadded = convolution.padding in ((0, 0), "valid")
    strided = max(convolution.stride) > 1 and convolution.kernel_size == (1, 1)
    return (
        unpadded
        and strided
        and convolution.groups == 1
        and 1 < convolution.in_channels < _SAFE_CHANNELS
    )


def _is_narrow(weight: Tensor | None) -> bool:
    if weight is None:
        return False
    shape = weight.shape
    return len(shape) == 4 and shape[2:] == (1, 1) and 1 < shape[1] < _SAFE_CHANNELS


def _every(x: Tensor, strides: Sequence[int]) -> Tensor:
    """Every ``strides[0]``-th row and ``strides[1]``-th column of ``x`` (...,H,W)."""
    return x[..., :: strides[0], :: strides[1]]
