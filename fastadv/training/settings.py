"""The settings of a step in three groups: its precision, the length of its run, its execution."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from fastadv.declared import Count, check_fields
from fastadv.engine.model.precision import pass_dtype
from fastadv.errors import UserError, brief, unknown

BN = ("local", "global")


@dataclass(frozen=True)
class Precision:
    """The data types of the passes.

    ``amp`` turns on mixed precision in ``amp_dtype`` ("bf16" or "fp16"). ``attack_dtype`` is
    another type for the attack's passes; None takes that of the outer pass. ``scaler`` is the
    ``GradScaler`` of float16; None takes one with PyTorch's defaults. Raises ``UserError`` for an
    ``amp`` that is not a bool, and for ``amp_dtype`` without ``amp``.
    """

    amp: bool = False
    amp_dtype: str = "bf16"
    attack_dtype: str | None = None
    scaler: torch.amp.GradScaler | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.scaler, torch.amp.GradScaler | None):
            raise UserError(
                f"scaler is a torch.amp.GradScaler or None, not {brief(self.scaler)}; without it "
                "the step makes its own."
            )
        if not isinstance(self.amp, bool):
            raise UserError(
                f"amp is True or False, not {brief(self.amp)}; the type is amp_dtype='fp16'."
            )
        if self.amp_dtype != "bf16" and not self.amp:
            raise UserError(
                f"amp_dtype={brief(self.amp_dtype)} is for mixed precision: also pass amp=True."
            )

    @property
    def is_own(self) -> bool:
        """True if the step sets the types of its passes; otherwise the caller's autocast does."""
        return self.amp or self.attack_dtype is not None

    def dtypes(self, device: torch.device) -> tuple[torch.dtype | None, torch.dtype | None]:
        """The types of the outer pass and of the attack's passes; None is the model's type."""
        outer = pass_dtype(self.amp_dtype, device) if self.amp else None
        attack = pass_dtype(self.attack_dtype, device) if self.attack_dtype else outer
        return outer, attack

    def scaler_for(self, device: torch.device) -> torch.amp.GradScaler | None:
        """The given scaler, or a new one if the outer pass is float16, or None."""
        if self.scaler is None and self.dtypes(device)[0] is torch.float16:
            return torch.amp.GradScaler(device.type)
        return self.scaler

    def __str__(self) -> str:
        outer = self.amp_dtype if self.amp else "the model's precision"
        return f"{outer}, attack {self.attack_dtype}" if self.attack_dtype else outer


@dataclass(frozen=True)
class RunLength:
    """The lengths of the run; None for each that the caller does not give.

    ``num_samples`` is the number of rows of the training set, ``num_classes`` the number of logits
    of the model. ``total_steps`` and ``steps_per_epoch`` count the calls that update
    (not those with ``update=False``).
    """

    num_samples: Count | None = None
    num_classes: Count | None = None
    total_steps: Count | None = None
    steps_per_epoch: Count | None = None

    def __post_init__(self) -> None:
        names = ("num_samples", "num_classes", "total_steps", "steps_per_epoch")
        check_fields(self, names)

    def in_updates(self, updates_per_batch: int) -> RunLength:
        """The same lengths with steps counted in updates of the weights."""
        many = updates_per_batch
        return replace(
            self,
            total_steps=self.total_steps * many if self.total_steps else None,
            steps_per_epoch=self.steps_per_epoch * many if self.steps_per_epoch else None,
        )


@dataclass(frozen=True)
class Execution:
    """How the passes run: ``mode`` is "auto", "eager", "compiled" or "captured"; ``backend`` is the
    one of ``torch.compile``. With ``strict`` an error is raised if ``mode`` cannot be used;
    otherwise the step warns and falls back to a simpler one. None means True unless ``mode`` is
    "auto". ``fused_norm`` "on" or "off" runs BatchNorm, ReLU and residual sums on CUDA in own
    kernels or in PyTorch's, with other rounding; "auto" takes the own ones on devices where they
    were measured to be faster. The own ones take activations in channels_last that are not float64;
    everywhere else, and on a CPU, PyTorch's run.

    ``bn`` is for several processes. "local": each computes its own part of the batch, with its own
    batch statistics, and the results are averaged. "global": all compute what one process would
    with the whole batch; BatchNorm takes its statistics over all processes, in the attack also.
    Then the passes run eagerly, and "auto" means that. With one process both are the same. Raises
    ``UserError`` for another word.
    """

    mode: str = "auto"
    backend: str = "inductor"
    strict: bool | None = None
    fused_norm: str = "auto"
    bn: str = "local"

    def __post_init__(self) -> None:
        if self.bn not in BN:
            raise unknown("bn", self.bn, BN)

    @property
    def is_strict(self) -> bool:
        """``strict`` with its default."""
        return self.mode != "auto" if self.strict is None else self.strict
