"""A tiny network with four residual stages, and helpers for tests of whole steps."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from tiny import CLASSES, EPS, LEARNING, flat_step
from torch import Tensor, nn
from torch.nn import functional

from fastadv.algorithms.contract import Adversarial
from fastadv.algorithms.resolution import resolve
from fastadv.data.view import View
from fastadv.threat import Threat
from fastadv.training.training_step import Step

WIDTH = 3
PAD = 2
SAMPLES = 12


class StagedBlock(nn.Module):
    """A pre-activation block whose shortcut is the identity."""

    def __init__(self) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(WIDTH)
        self.conv1 = nn.Conv2d(WIDTH, WIDTH, 3, padding=1, bias=False)
        self.conv2 = nn.Conv2d(WIDTH, WIDTH, 3, padding=1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        h = functional.softplus(self.bn1(x))
        return x + self.conv2(functional.softplus(self.conv1(h)))


class StagedNet(nn.Module):
    """Stem, layer1 to layer4 of one block each, BatchNorm, classifier: (B,3,6,6) to (B,4)."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, WIDTH, 3, padding=1, bias=False)
        self.layer1, self.layer2 = nn.Sequential(StagedBlock()), nn.Sequential(StagedBlock())
        self.layer3, self.layer4 = nn.Sequential(StagedBlock()), nn.Sequential(StagedBlock())
        self.bn = nn.BatchNorm2d(WIDTH)
        self.linear = nn.Linear(WIDTH, CLASSES)

    @property
    def blocks(self) -> list[StagedBlock]:
        return [stage[0] for stage in (self.layer1, self.layer2, self.layer3, self.layer4)]

    def forward(self, x: Tensor) -> Tensor:
        x = self.layer4(self.layer3(self.layer2(self.layer1(self.conv1(x)))))
        return self.linear(functional.softplus(self.bn(x)).mean((2, 3)))


def staged_model(seed: int = 0) -> StagedNet:
    """float64, weights drawn from ``seed``, in training mode."""
    torch.manual_seed(seed)
    return StagedNet().double()


def view_of(count: int, seed: int = 3) -> View:
    """Crops anywhere in the padded image, about half of them flipped."""
    generator = torch.Generator().manual_seed(seed)
    top, left = (torch.randint(0, 2 * PAD + 1, (count,), generator=generator) for _ in range(2))
    return View(top, left, torch.rand(count, generator=generator) < 0.5)


def window(padded: Tensor, view: View, row: int, size: int = 6) -> Tensor:
    """The crop of sample ``row`` of a batch from its ``padded`` image (C,H,W), by slicing."""
    top, left = int(view.top[row]), int(view.left[row])
    cut = padded[:, top : top + size, left : left + size]
    return cut.flip(-1) if view.flip[row] else cut


def put_back(padded: Tensor, view: View, row: int, seen: Tensor) -> None:
    """The inverse of ``window``, in place."""
    top, left, size = int(view.top[row]), int(view.left[row]), seen.shape[-1]
    seen = seen.flip(-1) if view.flip[row] else seen
    padded[:, top : top + size, left : left + size] = seen


def staged_step(
    model: nn.Module,
    method: str = "pgd",
    *,
    optimizer: torch.optim.Optimizer | None = None,
    eps: float = EPS,
    norm: str = "linf",
    total_steps: int | None = 8,
    steps_per_epoch: int | None = 2,
    num_samples: int | None = SAMPLES,
    mode: str = "eager",
    backend: Any = "aot_eager",
    bn: str = "local",
    before_update: Callable[[int], None] | None = None,
    **options: Any,
) -> Step:
    """A step of ``method``; ``optimizer`` is by default the one its layers ask for."""
    plan = resolve(method, options)
    if optimizer is None:
        groups = plan.layers.optimizer_groups(model, LEARNING["lr"])
        optimizer = torch.optim.SGD(groups, **LEARNING)
    return flat_step(
        model,
        optimizer,
        plan,
        Threat(norm, eps),
        mode=mode,
        backend=backend,
        bn=bn,
        num_samples=num_samples,
        total_steps=total_steps,
        steps_per_epoch=steps_per_epoch,
        before_update=before_update,
    )


def recorded(step: Step) -> list[Adversarial]:
    """A list that receives the results of the step's adversary."""
    found: list[Adversarial] = []
    make: Callable[..., Adversarial] = step.plan.adversary.make

    def recording(*inputs: Any) -> Adversarial:
        found.append(make(*inputs))
        return found[-1]

    step.plan.adversary.make = recording  # type: ignore[method-assign]
    return found


def gradient_at(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """The gradient of the batch's mean cross entropy at ``x``, in the model's present mode."""
    x = x.detach().requires_grad_()
    return torch.autograd.grad(functional.cross_entropy(model(x), y), x)[0]


def weights_of(model: nn.Module) -> dict[str, Tensor]:
    """A copy of weights and buffers."""
    return copy.deepcopy(model.state_dict())
