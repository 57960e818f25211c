"""The pieces of which a step consists."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn

from fastadv.algorithms import cost
from fastadv.algorithms.contract import PerturbsBlocks
from fastadv.algorithms.plan import Plan
from fastadv.by_epoch import ByEpoch
from fastadv.engine.compiled import Runner
from fastadv.engine.model import parameter_hooks
from fastadv.engine.model.fused_norm_choice import choose
from fastadv.engine.model.network import Network
from fastadv.engine.model.outputs import Output
from fastadv.engine.model.whole_norm import whole_statistics
from fastadv.engine.optimizer.updater import Updater
from fastadv.errors import UserError
from fastadv.models.blocks import perturbable_blocks
from fastadv.threat import Threat
from fastadv.training.captured import CapturedUpdate
from fastadv.training.changes import Changes
from fastadv.training.clock import Clock
from fastadv.training.divided import division_of
from fastadv.training.mode import compiles, first_mode, pick_mode
from fastadv.training.preparation import Preparation
from fastadv.training.settings import Execution, Precision, RunLength
from fastadv.training.together import Agreement
from fastadv.training.transaction import Transaction
from fastadv.training.update import Update


class Internals:
    """The pieces of a step, for this package, its tests and its benchmarks. They may change with
    every version; a training loop does not need them.

    ``net`` makes the forward passes. ``update`` is the order of one update; ``passes`` is the same
    or its captured form. ``updater`` applies gradients with the optimizer. ``offset`` (0-dim int64
    on the device) is the number of the update, by which noise is drawn. ``before_update`` is called
    before each update, with its number. ``radius`` is an eps that changes with the epoch.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        plan: Plan,
        threat: Threat,
        precision: Precision,
        length: RunLength,
        execution: Execution,
        *,
        max_grad_norm: float | None,
        seed: int,
        blocks: tuple[str, ...] | None,
        output: Output,
        before_update: Callable[[int], None] | None,
        radius: ByEpoch | None,
    ) -> None:
        device = next(model.parameters()).device
        self.plan, self.precision, self.length = plan, precision, length
        self.before_update = before_update
        self.division, self.bn = division_of(execution, model), execution.bn
        self.mode = first_mode(execution.mode, device)
        if self.division is not None:
            self.mode = "eager"
        outer, attack = precision.dtypes(device)
        strict = execution.is_strict
        fused = self.division is None and choose(execution.fused_norm, device)
        compiled = compiles(self.mode, length.total_steps)
        runner = Runner(compiled, execution.backend, strict=strict, fused_norm=fused)
        twice = plan.differentiates_twice
        self.net = Network(
            model, device, runner, outer, attack, differentiates_twice=twice, output=output,
            fused_norm=fused, division=self.division,
        )  # fmt: skip
        self.radius = radius
        if radius is not None:
            threat = threat.with_eps(max(radius.values()))
        for part in plan.parts.values():
            part.check_threat(threat)
        if radius is not None:  # filled before every update
            eps = torch.zeros((), device=device, dtype=torch.float64)
            threat = threat.filled(eps=eps)
        self.update = Update(plan, self.net, threat, seed)
        self.changes = Changes(plan, self.net, self.update, optimizer, _blocks(model, plan, blocks))
        self.passes: Update | CapturedUpdate = self.update
        if self.mode == "captured":
            self.passes = CapturedUpdate(self.update, strict=strict)
        self.updater = Updater(optimizer, device, precision.scaler_for(device), max_grad_norm)
        self.offset = torch.zeros((), dtype=torch.int64, device=device)
        self.clock = Clock(length.steps_per_epoch, plan.updates_per_batch)
        self.preparation = Preparation(
            plan, self.net, self.update, length, self.updater.faults.none_so_far
        )
        self.transaction = Transaction(self)
        self.agreement = Agreement(self.update)

    @property
    def runs_as(self) -> str:
        """How the passes run, in words: the mode, and "fused_norm on" if own kernels run where they
        take the activations."""
        return f"{self.mode}, fused_norm on" if self.net.fused_norm else self.mode

    @property
    def epoch(self) -> float:
        """The position in the run, in epochs (``Clock.epoch``)."""
        return self.clock.epoch

    @property
    def allocated(self) -> bool:
        """True once the state of the parts is allocated."""
        return self.preparation.allocated is not None

    @contextmanager
    def in_division(self) -> Iterator[None]:
        """Within this context all processes compute one whole batch, if ``bn`` is "global"."""
        if self.division is None:
            yield
            return
        twice = self.plan.differentiates_twice
        with self.division.at_work(), whole_statistics(self.division, twice=twice):
            yield

    def moment(self) -> tuple[Any, ...]:
        """The position in the run, for ``return_to``."""
        return self.clock.calls, self.clock.named_epoch, self.preparation.moment()

    def return_to(self, moment: tuple[Any, ...]) -> None:
        """Return to the position in the run at which ``moment`` was called."""
        self.clock.calls, self.clock.named_epoch, prepared = moment
        self.preparation.return_to(prepared)

    def resolve_mode(self, x: torch.Tensor) -> str:
        """Decide what mode "auto" means for batches like ``x`` (B,C,H,W), and return the mode."""
        if self.mode == "auto":
            plan, total = self.plan, self.length.total_steps
            units = cost.units(plan) * plan.updates_per_batch
            # Inductor takes ten minutes for a double backward on two cores: no run gains that back.
            known = None if plan.differentiates_twice else total
            self.mode = pick_mode(self.net, x, units, known)
            self.net.runner.compiles = compiles(self.mode, total)
        return self.mode

    def forget_shapes(self) -> None:
        """Drop compiled code and recordings, before batches of another shape that come to stay: the
        old ones would hold memory, and Dynamo limits how often it compiles one region."""
        self.net.runner.forget()
        if isinstance(self.passes, CapturedUpdate):
            self.passes.forget()

    def __getstate__(self) -> dict[str, Any]:
        """A copy or pickle continues bit for bit. Raises ``UserError`` for a parameter with a hook
        and for a gradient that waits for an update, which torch does not copy."""
        hooked = parameter_hooks.first_hooked(self.net.structure.parameters)
        if hooked is not None:
            raise UserError(
                f"A copy of this step would lose the hook on {hooked}, which torch does not copy: "
                "copy the model, put the hook on the copy and build a step of it."
            )
        if self.updater.waits:
            raise UserError(
                "A copy of this step would lose the gradient that waits for an update "
                "(update=False): copy it after the next update."
            )
        return vars(self)


def _blocks(
    model: nn.Module, plan: Plan, names: tuple[str, ...] | None
) -> Callable[[], list[tuple[str, nn.Module]]] | None:
    """A function that finds the residual blocks, or None if no part attacks them. Raises
    ``UserError`` for ``names`` that no part would use."""
    if "block_gradients" not in plan.needs:
        if names is not None:
            raise UserError(
                "blocks= is for adversaries that perturb inside the network: omit it with "
                f"{plan.method}."
            )
        return None
    places = [p.block_noise_at for p in plan.parts.values() if isinstance(p, PerturbsBlocks)]
    place = places[0] if places else "conv1"
    return partial(perturbable_blocks, model, None if names is None else list(names), at=place)
