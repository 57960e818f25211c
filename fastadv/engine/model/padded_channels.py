"""Pads the images' channels for a first convolution in half precision, by zeros to a multiple of 8.

Tensor cores multiply eight channels of half precision at a time, and cuDNN reaches them with three
channels only by another layout of its own. Zeros add nothing to a sum, and the gradient of the
images is that of their own channels, so that the result is the same up to the order of the sums.
The images are padded where autocast would cast them, in the same launch.

It is off, because no GPU has measured it: ``channels_padded`` switches it on for the GPU suite.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import partial

import torch
from torch import Tensor, nn

from fastadv import kernels
from fastadv.engine.model.bn_fold import is_plain

MULTIPLE = 8

_on: ContextVar[bool] = ContextVar("a new network pads its images' channels", default=False)


@contextmanager
def channels_padded() -> Iterator[None]:
    """Networks that are created within this context pad the channels of their images."""
    before = _on.set(True)
    try:
        yield
    finally:
        _on.reset(before)


def is_on() -> bool:
    """True within ``channels_padded()``."""
    return _on.get()


def channels_wanted(convolution: nn.Conv2d) -> int:
    """The number of channels of the padded images."""
    return -(-convolution.in_channels // MULTIPLE) * MULTIPLE


def padded_weight(weight: Tensor, channels: int) -> Tensor:
    """Zeros for a weight like ``weight`` (O,C,h,w) with ``channels`` channels, in channels_last."""
    wanted = weight.new_zeros(len(weight), channels, *weight.shape[2:])
    return wanted.contiguous(memory_format=torch.channels_last)


def image_convolutions(
    modules: Iterable[nn.Module], forward: Callable[[Tensor], object], x: Tensor
) -> list[nn.Conv2d]:
    """The convolutions whose images can be padded, from a pass ``forward(x)``.

    These are PyTorch's own, without groups and hooks, with a float32 weight in channels_last, whose
    number of channels is not a multiple of 8, and that get float32 images of the shape of ``x``
    (B,C,H,W): where they are in another type already, padding would be a launch more.
    """
    able = {module for module in modules if isinstance(module, nn.Conv2d) and _is_able(module)}
    other: set[nn.Module] = set()
    found: dict[nn.Conv2d, None] = {}

    def note(module: nn.Module, given: tuple[object, ...]) -> None:
        images = given[0] if given else None
        plain = type(images) is Tensor and (images.shape, images.dtype) == (x.shape, torch.float32)
        if plain and isinstance(module, nn.Conv2d):
            found[module] = None
        else:
            other.add(module)

    handles = [module.register_forward_pre_hook(note) for module in able]
    try:
        forward(x)
    finally:
        for handle in handles:
            handle.remove()
    return [module for module in found if module not in other]


def _is_able(module: nn.Conv2d) -> bool:
    weight = module._parameters.get("weight")
    return (
        is_plain(module, (nn.Conv2d,))
        and module.groups == 1
        and module.in_channels % MULTIPLE != 0
        and isinstance(weight, nn.Parameter)
        and weight.dtype == torch.float32
        and weight.is_contiguous(memory_format=torch.channels_last)
        # One channel or one pixel is both layouts: what the network is in, is not known.
        and not weight.is_contiguous()
    )


@contextmanager
def replaced(
    weights: Iterable[tuple[nn.Conv2d, nn.Parameter, nn.Parameter]],
) -> Iterator[None]:
    """Within this context each convolution computes with the second weight, and padded images,
    where it would with the first."""
    changed: list[nn.Conv2d] = []
    try:
        for convolution, weight, padded in weights:
            # An attribute of the object hides the method of its class.
            vars(convolution)["_conv_forward"] = partial(_forward, convolution, weight, padded)
            changed.append(convolution)
        yield
    finally:
        for convolution in changed:
            del vars(convolution)["_conv_forward"]


def _forward(
    convolution: nn.Conv2d,
    plain: nn.Parameter,
    padded: nn.Parameter,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
) -> Tensor:
    # Code of the model may pass another weight, or images that are wrong here.
    images = x.dim() == 4 and x.shape[1] == plain.shape[1]
    if weight is plain and images and torch.is_autocast_enabled(x.device.type):
        x, weight = kernels.pad_channels(x, padded.shape[1], padded.dtype), padded
    return nn.Conv2d._conv_forward(convolution, x, weight, bias)
