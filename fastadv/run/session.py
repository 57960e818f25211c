"""Everything a run is made of, built from its configuration: data, model, optimizer, step."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import nn

from fastadv.engine.process import distributed
from fastadv.engine.process.determinism import reproducible
from fastadv.engine.process.device import choose_device
from fastadv.errors import UserError
from fastadv.run.config import TrainConfig, require_settled
from fastadv.run.configured_model import configured_model
from fastadv.run.schedules import USUAL_DROPS, Schedule
from fastadv.run.source import Source, open_source
from fastadv.run.teachers import fingerprints, with_networks
from fastadv.threat import Threat
from fastadv.training.training_step import Step


def make_model(config: TrainConfig, data: Source) -> nn.Module:
    """The configured network for ``data``, weights drawn from the run's seed."""
    torch.manual_seed(config.seed)
    return configured_model(config, **data_facts(data))


def data_facts(data: Source) -> dict[str, Any]:
    """What a network takes from the data it is for."""
    return {
        "num_classes": data.num_classes,
        "in_channels": data.channels,
        "mean": data.mean,
        "std": data.std,
    }


@dataclass
class Session:
    """A run in memory."""

    config: TrainConfig
    device: torch.device
    data: Source
    model: nn.Module
    optimizer: torch.optim.Optimizer
    step: Step
    schedule: Schedule
    threat: Threat

    @classmethod
    def build(
        cls,
        config: TrainConfig,
        *,
        strict: bool | None = None,
        look: Callable[[Source], None] | None = None,
    ) -> Session:
        """Load the data and build everything ``config`` (settled) names.

        ``strict``: as ``Step`` has it. ``look`` sees the data before the model is built.
        """
        require_settled(config)
        device = choose_device(config.device)
        plan = config.plan()
        if "unlabelled_half" in plan.needs and config.unlabelled is None:
            raise UserError(
                f"{config.method} trains on pseudo-labelled images too: label some with "
                "fastadv pseudo-label RUN --images FILE.npz --out LABELLED.npz, then pass "
                "--unlabelled LABELLED.npz."
            )
        with distributed.first_alone():
            data = open_source(config, device, views=2 if "second_view" in plan.needs else 1)
        if look is not None:
            look(data)
        plan = with_networks(plan, data.num_classes, data.channels)
        # channels_last measured faster for every network and precision tried (bench/README.md).
        model = make_model(config, data).to(device)
        if distributed.rank() > 0:
            torch.manual_seed(config.seed + distributed.rank())  # dropout's masks are its own
        cast(Any, model).to(memory_format=torch.channels_last)  # torch's stubs leave it out
        lr = float(config.lr or 0.0)
        optimizer = torch.optim.SGD(
            plan.layers.optimizer_groups(model, lr),
            lr=lr,
            momentum=config.momentum,
            weight_decay=float(config.weight_decay or 0.0),
            nesterov=bool(config.nesterov),
            # One launch on a GPU, which masks itself where a loss was not finite; the same bits in
            # less time on a CPU.
            fused=True,
        )
        epochs = int(config.epochs or 1)
        threat = Threat(config.norm, float(config.eps or 0.0))
        step = Step(
            model,
            optimizer,
            plan,
            threat,
            amp=config.amp,
            amp_dtype=config.amp_dtype,
            attack_dtype=config.attack_dtype,
            mode=config.mode,
            strict=strict,
            num_samples=data.num_samples,
            num_classes=data.num_classes,
            total_steps=epochs * len(data.loader),
            steps_per_epoch=len(data.loader),
            max_grad_norm=config.max_grad_norm,
            seed=config.seed,
        )
        updates = epochs * len(data.loader) * plan.updates_per_batch
        shares = [drop if drop < 1 else drop / epochs for drop in config.drops or USUAL_DROPS]
        schedule = Schedule(
            optimizer,
            config.schedule or "constant",
            updates,
            cycle_momentum=bool(config.cycle_momentum),
            drops=shares,
        )
        step.before_update = schedule
        # What was chosen by measuring is written down and used again on resume.
        first = next(iter(data.loader.epoch(0))).image
        with reproducible(config.deterministic):  # it may time a pass
            mode = step.resolve_mode(first)
        config = dataclasses.replace(config, mode=cast(Any, mode))
        return cls(config, device, data, model, optimizer, step, schedule, threat)

    def digests(self) -> dict[str, str]:
        """A digest of each thing from outside that the run learns from: data, networks."""
        found = dict(self.data.content)
        for part in self.step.plan.parts.values():
            found |= part.depends_on()
        return found | fingerprints(self.config.plan())
