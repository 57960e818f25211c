"""Everything a run is made of, built from its configuration: data, model, optimizer, step."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fastadv.config import TrainConfig
from fastadv.data import Dataset, DeviceLoader, eval_batches, load, split_validation
from fastadv.errors import UserError
from fastadv.models import build_model
from fastadv.plan import Plan
from fastadv.schedules import Schedule
from fastadv.threat import Threat
from fastadv.training_step import Step

JUDGE_BATCH = 500


def choose_device(name: str) -> torch.device:
    """``auto`` is CUDA where there is one."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UserError(f"Unknown device {name!r}; use auto, cpu, cuda or cuda:N.") from None
    if device.type == "cuda" and not torch.cuda.is_available():
        raise UserError("There is no CUDA device here; leave --device away or say cpu.")
    return device


def make_model(config: TrainConfig, data: Dataset) -> nn.Module:
    """The configured network for ``data``, weights drawn from the run's seed."""
    torch.manual_seed(config.seed)
    extra: dict[str, Any] = {
        name: getattr(config, name)
        for name in ("width", "depth", "shortcut")
        if getattr(config, name) is not None
    }
    return build_model(
        config.model or "preact_resnet18",
        num_classes=data.num_classes,
        in_channels=data.train_images.shape[1],
        mean=list(data.mean),
        std=list(data.std),
        dropout=config.dropout,
        **extra,
    )


def load_data(config: TrainConfig) -> Dataset:
    """The configured data set."""
    return load(
        config.data, root=config.data_root, download=config.download, limit=config.limit
    )


class Judging:
    """Images to judge a model on, batch by batch, as often as asked."""

    def __init__(self, images: Tensor, labels: Tensor, device: torch.device) -> None:
        self.images, self.labels, self.device = images, labels, device

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return eval_batches(self.images, self.labels, JUDGE_BATCH, self.device)

    def __len__(self) -> int:
        return len(self.images)


@dataclass
class Session:
    """A run in memory."""

    config: TrainConfig
    device: torch.device
    data: Dataset
    model: nn.Module
    optimizer: torch.optim.Optimizer
    step: Step
    loader: DeviceLoader
    schedule: Schedule
    threat: Threat
    validation: Judging
    test: Judging

    @classmethod
    def build(cls, config: TrainConfig) -> Session:
        """Load the data and build everything ``config`` (settled) names."""
        if config.deterministic:
            torch.use_deterministic_algorithms(True)
        device = choose_device(config.device)
        data = load_data(config)
        model = make_model(config, data).to(device)
        plan = config.plan()
        lr = float(config.lr or 0.0)
        optimizer = torch.optim.SGD(
            plan.layers.optimizer_groups(model, lr),
            lr=lr,
            momentum=config.momentum,
            weight_decay=float(config.weight_decay or 0.0),
            nesterov=config.nesterov,
        )
        chosen, held_out = split_validation(data, float(config.val_fraction or 0), config.seed)
        validation = Judging(data.train_images[held_out], data.train_labels[held_out], device)
        some = config.test_limit
        test = Judging(data.test_images[:some], data.test_labels[:some], device)
        if config.select == "test":
            chosen, validation = torch.arange(len(data.train_images)), test
        loader = _make_loader(config, plan, data, device, chosen)
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
            num_samples=len(data.train_images),
            num_classes=data.num_classes,
            total_steps=epochs * len(loader),
            steps_per_epoch=len(loader),
            max_grad_norm=config.max_grad_norm,
            seed=config.seed,
        )
        updates = epochs * len(loader) * plan.updates_per_batch
        schedule = Schedule(
            optimizer, config.schedule or "constant", updates, cycle_momentum=config.cycle_momentum
        )
        step.before_update = schedule
        # What was chosen by measuring is written down and used again on resume.
        first = next(iter(loader.epoch(0))).image
        config = dataclasses.replace(config, mode=step.settle_mode(first))
        return cls(
            config, device, data, model, optimizer, step, loader, schedule, threat, validation, test
        )


def _make_loader(
    config: TrainConfig, plan: Plan, data: Dataset, device: torch.device, rows: Tensor
) -> DeviceLoader:
    return DeviceLoader(
        data.train_images,
        data.train_labels,
        batch_size=int(config.batch_size or 1),
        device=device,
        seed=config.seed,
        pad=int(config.pad or 0),
        flip=bool(config.flip),
        padding=config.padding or "constant",
        views=2 if "second_view" in plan.needs else 1,
        indices=rows,
    )
