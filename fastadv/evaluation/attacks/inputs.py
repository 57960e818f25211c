"""Checks of what a user hands to an attack or an evaluation, and the model as attacks see it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from fastadv.engine.compiled import Runner
from fastadv.engine.model.network import Network
from fastadv.engine.model.precision import autocast, pass_dtype
from fastadv.errors import UserError
from fastadv.models.wrapped import baked_modes, inner_module


def check_batch(x: Tensor, y: Tensor) -> None:
    """Raise ``UserError`` unless ``x`` (B,...) is floating and ``y`` (B,) holds its classes."""
    if not (torch.is_tensor(x) and torch.is_tensor(y)):
        raise UserError("Images and labels must be torch tensors; convert them with torch.tensor.")
    if not x.is_floating_point():
        raise UserError(
            f"Images must be floating point in [0, 1], not {x.dtype}; divide uint8 images by 255."
        )
    if y.is_floating_point() or y.dim() != 1 or x.dim() < 2 or len(x) != len(y):
        raise UserError(
            f"Images (B,...) need integer labels (B,), not images {tuple(x.shape)} with "
            f"{y.dtype} labels {tuple(y.shape)}."
        )


BOX_SENTENCE = (
    "Images must lie in [0, 1]: attacks live in pixels. Divide uint8 images by 255, and put "
    "normalisation inside the model (fastadv.build_model does)."
)


def attacked_network(model: nn.Module, device: torch.device, amp: bool | str) -> Network:
    """The network inside ``model`` as attacks see it, run as written.

    ``amp`` is False (the model's own type), True (bf16) or a name. Raises ``UserError`` for what
    cannot be judged: DataParallel, no module, one with lazy modules or traced in training mode.
    """
    inner = inner_module(model)
    if any(is_lazy(tensor) for tensor in (*inner.parameters(), *inner.buffers())):
        raise UserError(
            "The model has lazy modules that have seen no batch yet, so there is nothing to judge: "
            "call it once on images of its size, and train it, before."
        )
    if True in baked_modes(inner):
        raise UserError(
            "The model was traced in training mode, and stays in it: call model.eval() before "
            "torch.jit.trace, or pass the network itself."
        )
    name = amp if isinstance(amp, str) else ("bf16" if amp else "fp32")
    dtype = pass_dtype(name, device)
    return Network(inner, device, Runner(), outer_dtype=dtype, attack_dtype=dtype)


def model_device(model: nn.Module, otherwise: torch.device) -> torch.device:
    """Where the model's first parameter or buffer is."""
    inner = inner_module(model)
    for tensor in (*inner.parameters(), *inner.buffers()):
        return tensor.device
    return otherwise


@contextmanager
def attackable(net: Network) -> Iterator[None]:
    """Eval mode, frozen parameters, gradients on, also inside ``torch.inference_mode``.

    The caller's autocast is off, for a backward pass inside it would round the gradients.
    """
    net.copies.invalidate()  # what the caller did with the model since is not known here
    with torch.inference_mode(False), autocast(net.device, None), net.attacking("eval"):
        yield


def plain(tensor: Tensor) -> Tensor:
    """``tensor`` without a graph, usable in one: an inference tensor is copied."""
    return tensor.clone() if tensor.is_inference() else tensor.detach()
