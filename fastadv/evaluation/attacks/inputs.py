"""Checks the inputs of an attack or evaluation, and prepares the model for it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from fastadv.algorithms.user_loss import UserLoss
from fastadv.engine.compiled import Runner
from fastadv.engine.cuda_graph import CudaRecorder
from fastadv.engine.model.compiled_forward import CompiledForward
from fastadv.engine.model.network import Network
from fastadv.engine.model.outputs import Output
from fastadv.engine.model.precision import pass_dtype
from fastadv.errors import UserError, brief, unknown
from fastadv.evaluation.attacks.names import AttackSpec
from fastadv.evaluation.search.passes import Passes
from fastadv.models.wrapped import baked_modes, inner_module
from fastadv.ranges import require_float_images, require_plain
from fastadv.threat import Threat


def check_batch(x: Tensor, y: Tensor, *, any_labels: bool = False) -> None:
    """Raise ``UserError`` unless ``x`` (B,...) is floating and ``y`` holds its classes (B,) or soft
    labels (B,classes); with ``any_labels`` one entry of any shape for each image."""
    if not (torch.is_tensor(x) and torch.is_tensor(y)):
        raise UserError("Images and labels must be torch tensors; convert them with torch.tensor.")
    require_plain(images=x, labels=y)
    if not x.is_floating_point():
        raise UserError(
            f"Images must be floating point in [0, 1], not {x.dtype}; divide uint8 images by 255."
        )
    require_float_images("images", x)
    if any_labels:
        fits = y.dim() > 0
    else:
        fits = y.dim() == (2 if y.is_floating_point() else 1)
    if not fits or x.dim() < 2 or len(x) != len(y):
        other = "" if any_labels else "; for other labels pass a loss of your own, criterion="
        raise UserError(
            f"Images (B,...) need integer labels (B,) or soft labels (B,classes), not images "
            f"{tuple(x.shape)} with {y.dtype} labels {tuple(y.shape)}{other}."
        )


def labels(y: Tensor, x: Tensor, *, any_labels: bool) -> Tensor:
    """``y`` on the device of the images ``x`` (B,...): classes as int64, soft labels in the type of
    the logits, any other labels as they are."""
    if any_labels:
        return plain(y).to(x.device, non_blocking=True)
    wide = torch.promote_types(x.dtype, torch.float32) if y.is_floating_point() else torch.int64
    return plain(y).to(x.device, wide, non_blocking=True)


def require_followed(spec: AttackSpec, y: Tensor, criterion: UserLoss | None) -> None:
    """Raise ``UserError`` if the attack ``spec`` cannot follow a ``criterion``, or soft labels
    ``y``."""
    follows_classes = spec.objective not in (None, "ce", "kl")
    margins = follows_classes or spec.kind in ("cw", "cw-margin") or spec.only_searches
    if criterion is not None and (margins or spec.objective == "kl"):
        what = f"objective={spec.objective!r}" if spec.objective else f"The attack {spec.name!r}"
        raise UserError(
            f"{what} compares classes and follows no criterion of your own: use 'pgd-20'."
        )
    if margins and y.is_floating_point():
        raise UserError(
            f"The attack {spec.name!r} needs one class for each image: use 'pgd-20', or pass "
            "y.argmax(1)."
        )


def require_measured(spec: AttackSpec) -> None:
    """Raise ``UserError`` if a metric cannot tell the result of the attack ``spec``."""
    if spec.only_searches:
        raise UserError(
            f"The attack {spec.name!r} ends at an image of another class and follows no metric: "
            "use 'pgd-20', or omit metric=."
        )


def box_sentence(threat: Threat) -> str:
    """What is wrong with images outside of the range of ``threat``, and the way out."""
    if (threat.low, threat.high) == (0, 1):
        return (
            "Images must lie in [0, 1]: attacks work in pixels. Divide uint8 images by 255, and "
            "put normalisation inside the model (fastadv.build_model does)."
        )
    return (
        f"Images must lie between the threat's low={threat.low} and high={threat.high}; scale them "
        "as the threat says, or give it their range."
    )


def attacked_network(
    model: nn.Module,
    device: torch.device,
    amp: bool | str,
    output: Output = None,
    *,
    compiles: bool = False,
    compiled: CompiledForward | None = None,
) -> Network:
    """The network inside ``model``, prepared for attacks.

    ``amp`` is False (the model's own type), True (bf16) or the name of a type. ``output`` says
    where the logits are in what the model returns. With ``compiles`` whole regions are compiled
    (``Runner``), with ``compiled`` the forward pass. Raises ``UserError`` for models that cannot be
    evaluated: DataParallel, an object that is not a module, a module with lazy parameters, or one
    traced in training mode.
    """
    inner = inner_module(model)
    if any(is_lazy(tensor) for tensor in (*inner.parameters(), *inner.buffers())):
        raise UserError(
            "The model has lazy modules without parameters yet, so it cannot be evaluated: first "
            "call it once on images of its size, and train it."
        )
    if True in baked_modes(inner):
        raise UserError(
            "The model was traced in training mode and cannot leave it: call model.eval() before "
            "torch.jit.trace, or pass the network itself."
        )
    if not isinstance(amp, (bool, str)):
        raise UserError(f"amp is True, False or the name of a type, not {brief(amp)}.")
    if device.type == "meta":
        raise UserError("The model is on the device meta, without values: load its weights first.")
    name = amp if isinstance(amp, str) else ("bf16" if amp else "fp32")
    dtype = pass_dtype(name, device)
    return Network(
        inner, device, Runner(compiles), outer_dtype=dtype, attack_dtype=dtype, output=output,
        compiled=compiled,
    )  # fmt: skip


SEARCH_DTYPES = ("float32", "bf16")
MODES = ("auto", "eager", "compiled", "captured")


def require_mode(mode: str, device: torch.device) -> None:
    """Raise ``UserError`` unless attacks can run in ``mode`` on ``device``."""
    if mode not in MODES:
        raise unknown("mode", mode, MODES)
    if mode == "captured" and device.type != "cuda":
        raise UserError("mode='captured' replays CUDA graphs and needs a CUDA device; use 'auto'.")


def attack_passes(
    model: nn.Module,
    device: torch.device,
    amp: bool | str,
    output: Output = None,
    *,
    search_dtype: str = "float32",
    mode: str = "auto",
    repeats: int = 1,
    compiled: CompiledForward | None = None,
) -> Passes:
    """The passes of attacks on ``model``; see ``fastadv.evaluate`` for the settings. ``compiled``
    is used in mode "compiled" on a CPU, and may have compiled ``model`` before.

    Raises ``UserError`` as ``attacked_network`` does, and for unknown settings.
    """
    if search_dtype not in SEARCH_DTYPES:
        raise UserError(
            f"Searches are in {' or '.join(SEARCH_DTYPES)}, not in {brief(search_dtype)}: "
            "choose one as the search dtype."
        )
    require_mode(mode, device)
    if search_dtype == "bf16" and amp:
        raise UserError("With amp all passes are in low precision: omit search_dtype or amp.")
    # A device needs steps of one size; a CPU gains more by full batches of any size.
    how: dict[str, Any] = {}
    if mode == "compiled" and device.type == "cpu":
        how = {"compiled": compiled or CompiledForward()}
    elif mode == "compiled":
        how = {"compiles": True}
    network = attacked_network(model, device, amp, output, **how)
    fast = None
    if search_dtype == "bf16":
        fast = attacked_network(model, device, True, output, **how)
    return Passes(network, fast, repeats, recorder_for(device, mode))


def recorder_for(device: torch.device, mode: str) -> CudaRecorder | None:
    """What records the steps of searches as CUDA graphs, if they are to be."""
    return CudaRecorder(device) if device.type == "cuda" and mode != "eager" else None


def device_called(name: Any) -> torch.device:
    """The device that ``name`` is or names. Raises ``UserError`` for anything else."""
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (
        RuntimeError,
        TypeError,
        ValueError,
        AssertionError,
    ):  # no device, or one that is not here
        raise UserError(
            f"device is a torch.device or its name, such as 'cpu' or 'cuda:0', of this machine, "
            f"not {brief(name)}."
        ) from None
    return device


def model_device(model: nn.Module, otherwise: torch.device) -> torch.device:
    """The device of the model's first parameter or buffer; ``otherwise`` if it has none."""
    inner = inner_module(model)
    for tensor in (*inner.parameters(), *inner.buffers()):
        return tensor.device
    return otherwise


def plain(tensor: Tensor) -> Tensor:
    """``tensor`` detached; an inference tensor is copied, so that autograd can use it."""
    return tensor.clone() if tensor.is_inference() else tensor.detach()
