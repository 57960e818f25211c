"""The first part of a network that sees a pixel's neighbourhood alone: where an image changes in a
window, its results change in a somewhat larger window.

It consists of the convolutions on maps of the image's size, with stride 1 and zeros around the
maps, and of what acts on each pixel by itself: BatchNorm in eval mode, activations, sums. It ends
at the modules that make the maps smaller.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn


class LocalPart(NamedTuple):
    """``inside``: the convolutions that need the pixels around a window. ``ends``: the modules that
    take maps of the image's size and return smaller ones. ``radius``: a change of a pixel reaches
    the ends within so many pixels. ``share``: of the multiplications of a pass. ``channels``: of
    the maps that enter each of the modules; ``around``: the zeros that a module puts on every side
    of them."""

    inside: tuple[nn.Conv2d, ...]
    ends: tuple[nn.Module, ...]
    radius: int
    share: float
    channels: dict[nn.Module, int]
    around: dict[nn.Module, int]


class _Call(NamedTuple):
    entered: torch.Size
    left: torch.Size


def local_part(
    model: nn.Module, forward: Callable[[Tensor], Tensor], x: Tensor
) -> LocalPart | None:
    """The local part of ``model`` for images like ``x`` (n,C,H,W); None if it has none, as far as
    its modules show. ``forward`` computes its logits, without gradients.

    A function between the modules may be anything, so the result must be checked with values.
    """
    if not any(isinstance(module, nn.Conv2d) and _is_wide(module) for module in model.modules()):
        return None
    calls = _calls(model, forward, x)
    size = x.shape[2:]
    inside: list[nn.Conv2d] = []
    ends: list[nn.Module] = []
    channels: dict[nn.Module, int] = {}
    local = whole = 0
    for module, seen in calls.items():
        work = sum(_multiplications(module, call) for call in seen)
        whole += work
        at_size = [call for call in seen if len(call.entered) == 4 and call.entered[2:] == size]
        if not at_size:
            continue
        stays = all(len(call.left) == 4 and call.left[2:] == size for call in at_size)
        if stays and not isinstance(module, nn.Conv2d):
            continue  # one activation often serves the whole network
        if len(seen) > 1:
            return None
        call = seen[0]
        if isinstance(module, nn.Conv2d) and stays:
            if not _is_plain(module):
                return None
            local += work
            if not _is_wide(module):
                continue
            inside.append(module)
        else:
            ends.append(module)
        channels[module] = call.entered[1]
    if not inside or not ends:
        return None
    around = {module: int(module.padding[0]) for module in inside} | dict.fromkeys(ends, 0)
    radius = sum(around.values())
    return LocalPart(tuple(inside), tuple(ends), radius, local / whole, channels, around)


def _calls(
    model: nn.Module, forward: Callable[[Tensor], Tensor], x: Tensor
) -> dict[nn.Module, list[_Call]]:
    """The shapes of all calls of the modules without submodules in one pass of ``x``."""
    found: dict[nn.Module, list[_Call]] = {}

    def seen(module: nn.Module, given: tuple[Any, ...], result: Any) -> None:
        if given and isinstance(given[0], Tensor) and isinstance(result, Tensor):
            found.setdefault(module, []).append(_Call(given[0].shape, result.shape))

    leaves = [module for module in model.modules() if not any(True for _ in module.children())]
    hooks = [module.register_forward_hook(seen) for module in leaves]
    try:
        forward(x)
    finally:
        for hook in hooks:
            hook.remove()
    return found


def _multiplications(module: nn.Module, call: _Call) -> int:
    weight = getattr(module, "weight", None)
    if isinstance(module, nn.Conv2d | nn.Linear) and isinstance(weight, Tensor):
        return call.left.numel() * weight[0].numel()
    return 0


def _is_wide(module: nn.Conv2d) -> bool:
    return max(module.kernel_size) > 1


def _is_plain(module: nn.Conv2d) -> bool:
    """True for a convolution of a square with zeros around the map, and without stride."""
    kernel, dilation = module.kernel_size, module.dilation
    return (
        type(module) is nn.Conv2d
        and "forward" not in vars(module)
        and module.padding_mode == "zeros"
        and not isinstance(module.padding, str)
        and len({*kernel}) == len({*dilation}) == 1
        and tuple(module.stride) == (1, 1)
        and tuple(module.padding) == (dilation[0] * (kernel[0] - 1) // 2,) * 2
        and kernel[0] % 2 == 1
    )
