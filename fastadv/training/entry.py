"""``fastadv.step``: a training step from flat keyword arguments."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from fastadv.algorithms.resolution import resolve
from fastadv.models.wrapped import inner_module
from fastadv.threat import usual_threat
from fastadv.training import checks
from fastadv.training.settings import Execution, Precision, RunLength
from fastadv.training.training_step import Step


def step(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    method: str = "apart",
    *,
    eps: float | str | None = None,
    norm: str = "linf",
    amp: bool = False,
    mode: str = "auto",
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
    **options: Any,
) -> Step:
    """A training step of ``method`` for a training loop of one's own, in place of ``backward`` and
    ``optimizer.step``.

    Use: ``step = fastadv.step(model, optimizer, method="apart", num_samples=50_000,
    total_steps=...)``, then ``metrics = step(x, y, index=i)`` for each batch (``Step``).

    ``eps`` is the radius of the ball of ``norm`` ("linf" or "l2") in pixels of [0,1]: a number or
    text such as "8/255"; None is 8/255 in Linf and 128/255 in L2. ``amp``, ``amp_dtype``,
    ``attack_dtype`` and ``scaler`` are described at ``Precision``, ``mode`` at ``Execution``.
    ``num_samples`` is the number of training samples, ``num_classes`` the number of logits.
    ``total_steps`` and ``steps_per_epoch`` count calls. ``max_grad_norm`` clips the L2 norm of all
    gradients together. ``seed`` fixes the noise of the attacks. ``blocks`` names the modules whose
    input is perturbed in a network whose residual blocks are not recognised, such as
    "blocks.*.mlp.fc1". ``options`` are
    hyper-parameters of the parts, or the name of a slot with another part (``weights="rwp"``).

    Raises ``UserError`` for an unknown name, a value out of range, and a model, an optimizer or a
    combination of parts that cannot be trained.
    """
    plan = resolve(method, options)
    checks.check_optimizer(inner_module(model), optimizer)
    return Step(
        model,
        optimizer,
        plan,
        usual_threat(norm, eps),
        precision=Precision(amp, amp_dtype, attack_dtype, scaler),
        length=RunLength(num_samples, num_classes, total_steps, steps_per_epoch),
        execution=Execution(mode),
        max_grad_norm=max_grad_norm,
        seed=seed,
        blocks=None if blocks is None else tuple([blocks] if isinstance(blocks, str) else blocks),
    )
