"""A tiny float64 network and what tests need to write a training step by hand."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from fastadv.algorithms.criteria import resolve_with
from fastadv.algorithms.plan import Plan
from fastadv.threat import Threat
from fastadv.training.settings import Execution, Precision, RunLength
from fastadv.training.training_step import Step

EPS = 0.1
CLASSES = 4
STEP_SETTINGS = (
    *("total_steps", "steps_per_epoch", "seed", "num_classes", "amp", "amp_dtype"),
    *("scaler", "max_grad_norm", "backend", "blocks", "num_samples"),
    *("before_update", "output", "radius", "bn"),
)
LEARNING = {"lr": 0.05, "momentum": 0.9, "weight_decay": 5e-4}


class TinyNet(nn.Module):
    """Convolution, a residual block and a classifier: (B,3,6,6) to (B,4), float64."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 5, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(5)
        self.conv2 = nn.Conv2d(5, 5, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(5)
        self.linear = nn.Linear(5, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv1(x)
        x = x + self.conv2(functional.softplus(self.bn1(x)))
        return self.linear(4 * torch.tanh(self.bn2(x)).mean((2, 3)))


def tiny_model(seed: int = 2) -> TinyNet:
    """Weights and running statistics drawn from ``seed``; in training mode."""
    generator = torch.Generator().manual_seed(seed)
    model = TinyNet().double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator).double() * 0.5)
        for name, buffer in model.named_buffers():
            if "mean" in name or "var" in name:
                buffer.copy_(torch.rand(buffer.shape, generator=generator).double() + 0.5)
    return model


def tiny_batch(count: int = 8, seed: int = 1) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x, y, index and a non-zero start, drawn from ``seed``."""
    generator = torch.Generator().manual_seed(seed)
    # Samples of different brightness: the average over the image must not make them all alike.
    bright = torch.rand(count, 3, 1, 1, generator=generator)
    x = (bright * torch.rand(count, 3, 6, 6, generator=generator)).double()
    y = torch.randint(0, CLASSES, (count,), generator=generator)
    index = torch.randperm(20, generator=generator)[:count]
    start = (torch.rand(x.shape, generator=generator).double() * 2 - 1) * EPS
    return x, y, index, start


def sgd(model: nn.Module, **changes: float) -> torch.optim.SGD:
    """The optimizer of all tests of single steps."""
    return torch.optim.SGD(model.parameters(), **(LEARNING | changes))


def tiny_step(
    model: nn.Module, method: str = "pgd", *, mode: str = "eager", **options: Any
) -> Step:
    """A step of ``method`` on ``model`` with 20 samples; ``options`` are the parts' and:
    ``eps``, ``norm``, ``threat``, ``optimizer``, the criteria, and the settings of ``Step`` in
    ``STEP_SETTINGS``."""
    optimizer = options.pop("optimizer", None) or sgd(model)
    settings: dict[str, Any] = {"num_samples": 20, "backend": "aot_eager"}
    settings |= {name: options.pop(name) for name in STEP_SETTINGS if name in options}
    threat = options.pop("threat", None)
    threat = threat or Threat(options.pop("norm", "linf"), options.pop("eps", EPS))
    losses = [options.pop(name, None) for name in ("criterion", "attack_criterion")]
    plan = resolve_with(method, options, *losses)
    if isinstance(model, TinyNet) and "block_gradients" in plan.needs:
        settings.setdefault("blocks", ["conv2"])
    return flat_step(model, optimizer, plan, threat, mode=mode, **settings)


GROUPS = {"precision": Precision, "length": RunLength, "execution": Execution}


def flat_step(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    plan: Plan,
    threat: Threat,
    **settings: Any,
) -> Step:
    """A ``Step`` of ``plan``; ``settings`` are the fields of its groups, and its other options."""
    groups: dict[str, Any] = {}
    for name, group in GROUPS.items():
        fields = [field.name for field in dataclasses.fields(group) if field.name in settings]
        groups[name] = group(**{field: settings.pop(field) for field in fields})
    return Step(model, optimizer, plan, threat, **groups, **settings)


Loss = Callable[[Tensor], Tensor]


def climb(
    model: nn.Module, x: Tensor, start: Tensor, loss: Loss, alpha: float, steps: int, bn: str
) -> Tensor:
    """PGD by the book: ``steps`` sign steps that increase ``loss(logits)`` in the EPS ball."""
    model.train(bn == "train")
    x_adv = (x + start.clamp(-EPS, EPS)).clamp(0, 1)
    for _ in range(steps):
        x_adv = x_adv.detach().requires_grad_()
        (gradient,) = torch.autograd.grad(loss(model(x_adv)), x_adv)
        moved = x_adv.detach() + alpha * gradient.sign()
        x_adv = (x + (moved - x).clamp(-EPS, EPS)).clamp(0, 1)
    model.train()
    return x_adv.detach()


def descend(optimizer: torch.optim.Optimizer, loss: Tensor) -> None:
    """One optimizer step on ``loss``."""
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()


def twin(model: TinyNet) -> TinyNet:
    """An independent copy."""
    return copy.deepcopy(model)


def assert_same(first: nn.Module, second: nn.Module, tolerance: float = 1e-10) -> None:
    """Weights and buffers agree."""
    others = second.state_dict()
    for name, tensor in first.state_dict().items():
        torch.testing.assert_close(
            tensor, others[name], rtol=tolerance, atol=tolerance, msg=lambda m, n=name: f"{n}: {m}"
        )
