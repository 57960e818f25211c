"""Checks of the model, the optimizer and the shapes of the inputs of a step."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from fastadv import ranges
from fastadv.errors import UserError, brief
from fastadv.models.wrapped import baked_modes
from fastadv.threat import Threat
from fastadv.threat.mask import fits


def check_shapes(
    device: torch.device,
    x: Tensor,
    y: Tensor,
    index: Tensor | None,
    *,
    needs_index: bool,
    labels: str = "classes",
) -> None:
    """Raise ``UserError`` unless ``x`` is (B,C,H,W) float, ``y`` are ``labels`` (``Target.labels``)
    of B samples, ``index`` is (B,) int64, all are on ``device``, and ``x`` is not empty. ``index``
    may be None unless ``needs_index``."""
    for name, given in (("x", x), ("y", y), ("index", index)):
        absent = given is None and name == "index"
        if not absent and not isinstance(given, Tensor):
            raise UserError(f"{name} must be a torch.Tensor, not {type(given).__name__}.")
    ranges.require_plain(x=x, y=y, index=index)
    check_devices(device, x=x, y=y, index=index)
    if x.ndim != 4 or not x.is_floating_point():
        raise UserError(
            f"x must be float images (B,C,H,W), not {x.dtype} of shape {tuple(x.shape)}."
        )
    ranges.require_float_images("x", x)
    if not x.numel():
        raise UserError(f"x holds no image: its shape is {tuple(x.shape)}.")
    if labels == "any":
        _check_any_labels(x, y)
    else:
        _check_class_labels(x, y)
    if index is None and needs_index:
        raise UserError(
            "This method stores state for every training sample: pass index=, the rows "
            "(B,) int64 of the training set that x was made from."
        )
    if index is not None and (index.shape != x.shape[:1] or index.dtype != torch.int64):
        raise UserError(
            f"index must be int64 of shape ({len(x)},), not {index.dtype} of {tuple(index.shape)}."
        )


def _check_any_labels(x: Tensor, y: Tensor) -> None:
    """Raise ``UserError`` unless ``y`` has one entry, of any shape, for each image."""
    if y.ndim == 0 or len(y) != len(x):
        raise UserError(
            f"y must have one entry per image, a shape that begins with {len(x)}, not "
            f"{tuple(y.shape)}."
        )


def _check_class_labels(x: Tensor, y: Tensor) -> None:
    """Raise ``UserError`` unless ``y`` are (B,) int64 labels or (B,classes) floating ones."""
    if y.shape == x.shape[:1] and y.dtype == torch.int64:
        return
    if y.ndim == 2 and len(y) == len(x) and y.shape[1] > 1 and y.is_floating_point():
        return
    raise UserError(
        f"y must be int64 labels of shape ({len(x)},) or soft labels ({len(x)},classes), not "
        f"{y.dtype} of {tuple(y.shape)}; {_way_out(y, len(x))}."
    )


def _way_out(y: Tensor, count: int) -> str:
    """The end of an error: how to convert ``y``, if it holds labels in another form."""
    if y.shape == (count, 1) and not y.is_floating_point():
        return "pass y.squeeze(1).long()"
    if y.shape == (count,) and not y.is_floating_point():
        return "pass y.long()"
    if y.ndim == 2 and len(y) == count and y.shape[1] > 1:
        return "pass y.float() of one-hot rows, or y.argmax(1)"
    return "for other labels than classes pass a loss of your own, criterion="


def check_labels_read(x: Tensor, y: Tensor, reader: str) -> None:
    """Raise ``UserError`` unless ``y`` are labels of classes of the images ``x``, which the part
    that ``reader`` names needs beside a target that takes any labels."""
    if not isinstance(x, Tensor) or x.is_nested or not x.ndim:
        return  # refused with the other shapes
    hard = isinstance(y, Tensor) and y.shape == x.shape[:1] and y.dtype == torch.int64
    soft = isinstance(y, Tensor) and y.ndim == 2 and len(y) == len(x) and y.is_floating_point()
    if not hard and not soft:
        raise UserError(
            f"{reader} compares predictions of classes, also beside a loss of your own: y must be "
            f"int64 labels ({len(x)},) or soft labels ({len(x)},classes); choose another part."
        )


def check_class_logits(logits: Tensor, reader: str) -> None:
    """Raise ``UserError`` unless ``logits`` are (B,classes), which the part that ``reader`` names
    needs beside a target that takes any labels."""
    if logits.ndim != 2 or logits.shape[1] < 2:
        raise UserError(
            f"{reader} compares predictions of classes, also beside a loss of your own: the model "
            f"must return logits (B,classes), not {tuple(logits.shape)}; choose another part."
        )


def refuse_soft(hard_labels_only: str) -> None:
    """Raise ``UserError`` for soft labels if there is a reason why the method takes none."""
    if hard_labels_only:
        raise UserError(
            f"y holds soft labels, and {hard_labels_only}; pass classes (B,) int64, such as "
            "y.argmax(1), or choose another part."
        )


def check_companions(x: Tensor, **given: Tensor | None) -> None:
    """Raise ``UserError`` unless each of ``given`` is None or a tensor of the shape of ``x`` on its
    device."""
    for name, tensor in given.items():
        if tensor is None:
            continue
        if not isinstance(tensor, Tensor) or tensor.shape != x.shape:
            found = tuple(tensor.shape) if isinstance(tensor, Tensor) else type(tensor).__name__
            raise UserError(f"{name} must have the images' shape {tuple(x.shape)}, not {found}.")
        ranges.require_plain(**{name: tensor})
        if not tensor.is_floating_point():
            raise UserError(f"{name} must be of a float type, not {tensor.dtype}.")
        ranges.require_float_images(name, tensor)
    check_devices(x.device, **given)


def check_radii(x: Tensor, *, takes_alpha: bool, **given: Tensor | None) -> None:
    """Raise ``UserError`` unless each of ``given`` (eps, alpha) is None or a float tensor (B,) on
    the device of ``x``, and for an alpha of a method that ``takes_alpha`` of no image."""
    for name, tensor in given.items():
        if tensor is None:
            continue
        right = isinstance(tensor, Tensor) and tensor.is_floating_point()
        if not right or tensor.shape != x.shape[:1]:
            raise UserError(
                f"{name} of a call is a float tensor of shape ({len(x)},), one for each image; for "
                f"one {name} for all pass {name}= to fastadv.step."
            )
    if given.get("alpha") is not None and not takes_alpha:
        raise UserError("This method's attack takes no step of a chosen size: omit alpha=.")
    check_devices(x.device, **given)


def check_mask(x: Tensor, mask: Tensor | None) -> None:
    """Raise ``UserError`` unless ``mask`` is None or bool (B or 1,C or 1,H,W) beside ``x``."""
    if mask is None:
        return
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool or not fits(mask, x):
        raise UserError(
            "mask is bool and (B or 1, C or 1, H, W), true for the pixels that may move; the "
            f"images are {tuple(x.shape)}."
        )
    check_devices(x.device, mask=mask)


def check_own_threat(x: Tensor, threat: Threat, eps: Tensor | None, mask: Tensor | None) -> None:
    """Raise ``UserError`` unless the tensors of the step's ``threat`` fit the images ``x``, where
    the call gives no ``eps`` and ``mask`` in their place."""
    eps = threat.eps if eps is None else None
    if isinstance(eps, Tensor) and eps.dim() and len(eps) != len(x):
        raise UserError(
            f"The threat's eps holds {len(eps)} radii, one for each image of a batch, but this one "
            f"has {len(x)} images: pass eps= to the call."
        )
    if threat.mask is not None and mask is None:
        check_mask(x, threat.mask)
    if isinstance(eps, Tensor):
        check_devices(x.device, **{"threat's eps": eps})


def check_targets(y: Tensor, targets: Tensor | None, *, targeted: bool) -> None:
    """Raise ``UserError`` unless ``targets`` fits ``y`` and the threat is targeted, and for labels
    among which no other class can be drawn."""
    if targets is None:
        if targeted and (y.ndim != 1 or y.is_floating_point()):
            raise UserError("Only for labels (B,) int64 can a target be drawn: pass targets=.")
        return
    if not targeted:
        raise UserError(
            "targets= are for a targeted attack: pass threat=fastadv.Threat(targeted=True) to "
            "fastadv.step."
        )
    if not isinstance(targets, Tensor) or (targets.shape, targets.dtype) != (y.shape, y.dtype):
        raise UserError(f"targets are like y: {y.dtype} of shape {tuple(y.shape)}.")
    check_devices(y.device, targets=targets)


def check_devices(device: torch.device, **tensors: Tensor | None) -> None:
    """Raise ``UserError`` unless every tensor is on ``device``, that of the model."""
    for name, tensor in tensors.items():
        if tensor is not None and tensor.device != device:
            raise UserError(
                f"{name} is on {tensor.device} and the model on {device}; move it there: "
                f"{name}.to({str(device)!r})."
            )


def check_mode(model: nn.Module) -> None:
    """Raise ``UserError`` for a TorchScript model that stays in the mode in which it was traced."""
    if baked_modes(model):
        raise UserError(
            "The model was traced or frozen by TorchScript and stays in the mode it was recorded "
            "in, so that train() means nothing to it: pass the network itself, or torch.jit.script."
        )


def check_optimizer(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Raise ``UserError`` unless ``optimizer`` is an optimizer of parameters of this model that can
    learn, needs no closure and does not unscale gradients itself."""
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise UserError(f"optimizer must be a torch.optim.Optimizer, not {brief(optimizer)}.")
    if isinstance(optimizer, torch.optim.LBFGS):
        raise UserError(
            "LBFGS evaluates the loss many times per step; use an optimizer that needs no closure, "
            "such as SGD or Adam."
        )
    if isinstance(optimizer, torch.optim.SparseAdam):
        raise UserError("SparseAdam is for sparse gradients, of which a step has none: use Adam.")
    if _scaler_of(optimizer) is not None:
        raise UserError(
            "This optimizer unscales gradients itself (fp16 in accelerate or Lightning), and "
            "fastadv.step does so too: pass amp=True, amp_dtype='fp16' to fastadv.step and no "
            "precision to accelerate or Lightning."
        )
    check_whole_weights(model)
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    own = [parameter for parameter in model.parameters() if id(parameter) in held]
    if not own:
        raise UserError("The optimizer holds none of the model's parameters: build it from them.")
    if any(not is_lazy(parameter) and parameter.is_inference() for parameter in own):
        raise UserError(
            "The model's weights were made inside torch.inference_mode and cannot learn; build the "
            "model outside of it."
        )
    if not any(parameter.requires_grad for parameter in own):
        raise UserError("All of the model's parameters are frozen (requires_grad=False).")


def check_whole_weights(model: nn.Module) -> None:
    """Raise ``UserError`` if a process holds only its share of the model's weights (FSDP)."""
    # Recognised by their names: importing torch's classes is slow.
    kinds = {base.__name__ for module in model.modules() for base in type(module).__mro__}
    kinds |= {type(parameter).__name__ for parameter in model.parameters()}
    if kinds & {"FSDPModule", "FullyShardedDataParallel", "DTensor"}:
        raise UserError(
            "The model's weights are sharded over processes (FSDP, DTensor), and attacks and "
            "perturbations of the weights need whole ones: use DistributedDataParallel (torchrun)."
        )


def _scaler_of(optimizer: torch.optim.Optimizer) -> object | None:
    """The gradient scaler of an optimizer wrapped by accelerate or Lightning, or None."""
    strategy = getattr(optimizer, "_strategy", None)
    lightning = getattr(getattr(strategy, "precision_plugin", None), "scaler", None)
    return getattr(optimizer, "scaler", None) or lightning


def check_accumulation(optimizer: torch.optim.Optimizer) -> None:
    """Raise ``UserError`` for an optimizer of accelerate while it accumulates gradients, since it
    would silently skip its step."""
    state = getattr(optimizer, "gradient_state", None)
    if state is not None and not state.sync_gradients:
        raise UserError(
            "accelerate accumulates gradients and would skip this update: call the step with "
            "update=accelerator.sync_gradients."
        )


def check_classes(logits: Tensor, y: Tensor, num_classes: int | None) -> int:
    """The number of classes of ``logits`` (B,classes). Raises ``UserError`` for another shape, if
    it is not ``num_classes``, and if the labels ``y``, (B,) or (B,classes), are out of range."""
    if logits.ndim != 2:
        raise UserError(
            f"The model must return logits (B,classes), not {tuple(logits.shape)}; train other "
            "outputs by a loss of your own, criterion=."
        )
    found = logits.shape[1]
    ranges.require_classes(found)
    if num_classes is not None and num_classes != found:
        raise UserError(f"num_classes is {num_classes} but the model returns {found} logits.")
    ranges.require_width(y, found)
    ranges.require_labels(y, found)
    return found


def check_outputs(logits: Tensor, count: int, num_classes: int | None) -> int:
    """The number of outputs per sample of ``logits`` (B,...), of any shape. Raises ``UserError``
    unless there are ``count`` samples and, if it is given, ``num_classes`` outputs."""
    if logits.ndim == 0 or len(logits) != count:
        raise UserError(
            f"The model must return outputs for each of {count} images, not {tuple(logits.shape)}."
        )
    found = logits[0].numel()
    if num_classes is not None and num_classes != found:
        raise UserError(f"num_classes is {num_classes} but the model returns {found} outputs.")
    return found


def check_batch_of_one(model: nn.Module, x: Tensor) -> None:
    """Raise ``UserError`` for a batch of one image if a BatchNorm of the model trains on the
    statistics of the batch."""
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    if len(x) == 1 and any(module.training or not model.training for module in norms):
        raise UserError(
            "A batch of one image cannot train a network with BatchNorm; use a larger batch size, "
            "or drop the last batch."
        )
