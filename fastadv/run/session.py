"""Everything a run is made of, built from its configuration: data, model, optimizer, step."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import nn

from fastadv.by_epoch import Ramp
from fastadv.engine.process import distributed
from fastadv.engine.process.determinism import reproducible
from fastadv.engine.process.device import choose_device
from fastadv.errors import UserError, warn
from fastadv.run.begun import Begun
from fastadv.run.built_for import BuiltFor
from fastadv.run.config import RunConfig
from fastadv.run.configured_model import configured_model
from fastadv.run.initial import DIGEST, Initial, begin_with
from fastadv.run.optimizers import make_optimizer
from fastadv.run.origin import Origin
from fastadv.run.own_schedule import OwnSchedule, is_own
from fastadv.run.schedules import Schedule
from fastadv.run.sizes_taken import require_taken
from fastadv.run.source import Source, open_source
from fastadv.run.teachers import fingerprints, with_networks
from fastadv.run.without_effect import without_effect
from fastadv.threat import Threat
from fastadv.training.settings import Execution, Precision, RunLength
from fastadv.training.training_step import Step


def make_model(config: RunConfig, data: Source) -> nn.Module:
    """The configured network for ``data``, weights drawn from the run's seed."""
    torch.manual_seed(config.seed)
    return configured_model(config, **data_facts(data))


def built_for(data: Source) -> BuiltFor:
    """What a network for ``data`` is built for."""
    return BuiltFor(
        data.num_classes, data.channels, data.image_size, data.mean, data.std, data.classes
    )


def _mode(config: RunConfig) -> str:
    """The mode of the run's step. A run that one process began in a mode which several cannot have
    goes on without it."""
    several = config.bn == "global" and distributed.world_size() > 1
    return "auto" if several and _stored_mode(config) else config.mode


def _stored_mode(config: RunConfig) -> bool:
    """True if the mode is that of the run as it was begun, and nobody asks for it this time."""
    return config.origins.get("mode") is Origin.STORED


def data_facts(data: Source) -> dict[str, Any]:
    """What a network takes from the data it is for."""
    return built_for(data).facts()


@dataclass
class Session:
    """A run in memory."""

    config: RunConfig
    device: torch.device
    data: Source
    model: nn.Module
    optimizer: torch.optim.Optimizer
    step: Step
    schedule: Schedule
    threat: Threat
    initial: Initial | None = None  # None: weights drawn from the seed

    @classmethod
    def build(
        cls,
        config: RunConfig,
        begun: Begun | None = None,
    ) -> Session:
        """Load the data and build everything that ``config`` names; ``begun``: for a run that has
        begun, whose weights of ``config.init`` are not read again."""
        device = choose_device(config.device)
        plan = config.plan
        own = OwnSchedule(config.schedule, config.epochs) if is_own(config.schedule) else None
        for sentence in without_effect(config):
            warn(sentence)
        if config.fused_norm == "on" and device.type != "cuda":
            warn(f"--fused-norm on is for CUDA: on the {device.type} BatchNorm is PyTorch's.")
        if "unlabelled_half" in plan.needs and config.unlabelled is None:
            objective = plan.slots["objective"]
            raise UserError(
                f"Objective {objective!r} trains on pseudo-labelled images: label some with "
                "fastadv pseudo-label RUN --images FILE.npz --out LABELLED.npz, then pass "
                "--unlabelled LABELLED.npz."
            )
        with distributed.first_alone():
            views = 2 if "second_view" in plan.needs else 1
            data = open_source(config, device, views, None if begun is None else begun.files)
        if begun is not None:
            begun.require_fit(data_facts(data))
        plan = with_networks(plan, data.num_classes, data.channels)
        # channels_last measured faster for every network and precision tried (bench/README.md).
        model = make_model(config, data)
        initial = None if begun is None else begun.initial()
        if config.init is not None and initial is None:
            initial = begin_with(config, model, data.num_classes)
        model = model.to(device)
        if config.image_sizes is not None:
            require_taken(model, config.image_sizes, data.channels)
        if distributed.rank() > 0:
            torch.manual_seed(config.seed + distributed.rank())  # dropout's masks are its own
        cast(Any, model).to(memory_format=torch.channels_last)  # torch's stubs leave it out
        optimizer = make_optimizer(config, model)
        threat = Threat(config.norm, config.eps)
        updates = config.epochs * len(data.loader) * plan.updates_per_batch
        drops = () if config.drops is None else config.drops
        shares = [drop if drop < 1 else drop / config.epochs for drop in drops]
        schedule = Schedule(
            optimizer,
            config.schedule,
            updates,
            cycle_momentum=config.cycle_momentum,
            drops=shares,
            drop_factors=config.drop_factors,
            peak=config.peak,
            epochs=config.epochs,
            end=config.end_factor,
            points=config.points,
            warmup=config.warmup,
            own=own,
        )
        step = Step(
            model,
            optimizer,
            plan,
            threat,
            precision=Precision(config.amp, config.amp_dtype, config.attack_dtype),
            length=RunLength(
                data.num_samples,
                data.num_classes,
                total_steps=config.epochs * len(data.loader),
                steps_per_epoch=len(data.loader),
            ),
            execution=Execution(
                _mode(config),
                # A mode that was chosen by measuring may have been given up for a simpler one.
                strict=False if begun is not None and _stored_mode(config) else None,
                fused_norm=config.fused_norm,
                bn=config.bn,
            ),
            max_grad_norm=config.max_grad_norm,
            seed=config.seed,
            blocks=config.blocks,
            before_update=schedule,
            radius=None if config.eps_warmup is None else Ramp(0.0, config.eps, config.eps_warmup),
        )
        # What was chosen by measuring is written down and used again on resume.
        first = next(iter(data.loader.epoch(0))).image
        with reproducible(config.deterministic):  # it may time a pass
            mode = step.resolve_mode(first)
        config = dataclasses.replace(config, mode=cast(Any, mode))
        if config.fused_norm == "auto":
            fused = step.internals.net.fused_norm
            config = dataclasses.replace(config, fused_norm="on" if fused else "off")
        return cls(config, device, data, model, optimizer, step, schedule, threat, initial)

    def digests(self) -> dict[str, str]:
        """A digest of each thing from outside that the run learns from: data, networks."""
        found = dict(self.data.content)
        found |= self.step.plan.depends_on()
        if self.initial is not None:
            found[DIGEST] = self.initial.digest
        return found | fingerprints(self.config.plan)
