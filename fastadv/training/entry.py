"""``fastadv.step``: a training step from flat keyword arguments."""

from __future__ import annotations

import inspect
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from fastadv.algorithms.criteria import resolve_with
from fastadv.algorithms.user_loss import UserLoss
from fastadv.by_epoch import ByEpoch, Phases, Ramp
from fastadv.declared import ChangingNonNegative, coerce
from fastadv.engine.model.outputs import Output
from fastadv.errors import UserError, brief
from fastadv.models.wrapped import inner_module
from fastadv.threat import Threat, usual_threat
from fastadv.training import checks
from fastadv.training.settings import Execution, Precision, RunLength
from fastadv.training.training_step import Step


def step(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    method: str = "apart",
    *,
    eps: float | str | ByEpoch | None = None,
    norm: str = "linf",
    threat: Threat | None = None,
    amp: bool = False,
    mode: str = "auto",
    fused_norm: str = "auto",
    bn: str = "local",
    num_samples: int | None = None,
    num_classes: int | None = None,
    total_steps: int | None = None,
    steps_per_epoch: int | None = None,
    scaler: torch.amp.GradScaler | None = None,
    max_grad_norm: float | None = None,
    seed: int = 0,
    amp_dtype: str = "bf16",
    attack_dtype: str | None = None,
    blocks: Iterable[str] | None = None,
    criterion: UserLoss | None = None,
    attack_criterion: UserLoss | None = None,
    output: Output = None,
    **options: Any,
) -> Step:
    """A training step of ``method`` for a training loop of one's own, in place of ``backward`` and
    ``optimizer.step``.

    Use: ``step = fastadv.step(model, optimizer, method="apart", num_samples=50_000,
    total_steps=...)``, then ``metrics = step(x, y, index=i)`` for each batch (``Step``).

    ``eps`` is the radius of the ball of ``norm`` ("linf" or "l2") in pixels of [0,1]: a number or
    text such as "8/255"; None is 8/255 in Linf and 128/255 in L2. It may change with the epoch:
    ``fastadv.Ramp(0, 8/255, epochs=15)`` or "0..8/255@15", ``fastadv.Phases({0: 2/255, 30:
    8/255})`` or "2/255@0,8/255@30"; so may ``alpha`` and, by phases, ``steps`` of an attack.
    ``threat`` replaces both: another range of images, a mask, a targeted attack. ``amp``,
    ``amp_dtype``, ``attack_dtype`` and ``scaler`` are described at ``Precision``, ``mode`` at
    ``Execution``. ``fused_norm`` "on" runs BatchNorm, ReLU and residual sums in own kernels on
    CUDA, "auto" only where they were measured to be faster, "off" in PyTorch's; the own ones take
    activations in channels_last (``Execution``).
    ``bn`` "global" makes several processes compute the update of one with the whole batch, with
    batch statistics over all of them; "local" averages what each computes with its own.
    ``num_samples`` is the number of training samples, ``num_classes`` the number of logits.
    ``total_steps`` and ``steps_per_epoch`` count the calls that update. ``max_grad_norm`` clips the
    L2 norm of all gradients together. ``seed`` fixes the noise of the attacks. ``blocks`` names the
    modules whose input is perturbed in a network whose residual blocks are not recognised, such as
    "blocks.*.mlp.fc1".

    ``criterion(logits, y) -> (B,)`` is a loss of your own, which the attack maximises and the
    update minimises in place of the cross entropy; ``y`` may then be any tensor (B,...).
    ``attack_criterion`` is one that the attack alone maximises.
    ``output`` says where the logits are in what the model returns: a position, a key or attribute,
    or a function of it; None takes a tensor, or what is called "logits" in an object.
    ``options`` are hyper-parameters of the parts, or the name of a slot with another part
    (``weights="rwp"``).

    Raises ``UserError`` for an unknown name, a value out of range, and a model, an optimizer or a
    combination of parts that cannot be trained.
    """
    if threat is not None and not isinstance(threat, Threat):
        raise UserError(
            f"threat must be a fastadv.Threat, such as Threat('l2'), not {brief(threat)}."
        )
    if threat is not None and (eps is not None or norm != "linf"):
        raise UserError("threat= holds the ball: omit eps= and norm=.")
    radius = None if eps is None else coerce("eps", eps, ChangingNonNegative)
    fixed = None if isinstance(radius, (Ramp, Phases)) else radius
    plan = resolve_with(method, options, criterion, attack_criterion, _ARGUMENTS)
    _require_own_names(plan.options)
    checks.check_optimizer(inner_module(model), optimizer)
    return Step(
        model,
        optimizer,
        plan,
        usual_threat(norm, fixed) if threat is None else threat,
        radius=radius if isinstance(radius, (Ramp, Phases)) else None,
        precision=Precision(amp, amp_dtype, attack_dtype, scaler),
        length=RunLength(num_samples, num_classes, total_steps, steps_per_epoch),
        execution=Execution(mode, fused_norm=fused_norm, bn=bn),
        max_grad_norm=max_grad_norm,
        seed=seed,
        output=output,
        blocks=None if blocks is None else _names("blocks", blocks),
    )


def _names(what: str, given: Any) -> tuple[str, ...]:
    """``given``, one text or several, as a tuple. Raises ``UserError`` for anything else."""
    names = [given] if isinstance(given, str) else given
    several = isinstance(names, Iterable) and not isinstance(names, (bytes, dict, torch.Tensor))
    found = tuple(names) if several else ()
    if not found or not all(isinstance(name, str) for name in found):
        raise UserError(f"{what} are names of modules, such as 'layer1.*', not {brief(given)}.")
    return found


def _require_own_names(options: Iterable[str]) -> None:
    """Raise ``UserError`` if an option of a part has the name of an argument of ``step``, which
    would take its values."""
    for name in options:
        if name in _ARGUMENTS - {"criterion", "attack_criterion"}:
            raise UserError(
                f"A part of the method has an option {name!r}, which is an argument of "
                "fastadv.step: give the option another name."
            )


_ARGUMENTS = inspect.signature(step).parameters.keys() - {"model", "optimizer", "options"}
