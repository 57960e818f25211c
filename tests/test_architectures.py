"""Families of timm and torchvision take steps of PGD, AWP and TRADES: eagerly the same as a loop
written by hand, compiled the same as eagerly."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from architectures import ARCHITECTURES, CLASSES, Architecture
from tiny import flat_step
from torch import Tensor, nn
from torch.nn import functional

from fastadv.algorithms.resolution import resolve
from fastadv.threat import Threat

EPS, ALPHA, STEPS, GAMMA, BETA = 0.03, 0.01, 2, 0.01, 6.0
UPDATES = 2
METHODS = ("pgd", "awp", "trades")
QUICKER = (
    *("torchvision-convnext", "torchvision-efficientnet", "torchvision-regnet"),
    *("torchvision-swin", "torchvision-vit", "timm-resnet"),
)


def made(architecture: Architecture) -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the libraries' own
        model = architecture.build().double().train()
    return model, torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)


def batches(architecture: Architecture) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Images, labels and a start for every update."""
    generator = torch.Generator().manual_seed(1)
    shape = (4, 3, architecture.size, architecture.size)
    found = []
    for _ in range(UPDATES):
        x = torch.rand(shape, generator=generator, dtype=torch.float64)
        y = torch.randint(0, CLASSES, (4,), generator=generator)
        start = EPS * (2 * torch.rand(shape, generator=generator, dtype=torch.float64) - 1)
        found.append((x, y, start))
    return found


def trained(architecture: Architecture, method: str, mode: str) -> nn.Module:
    model, optimizer = made(architecture)
    options: dict[str, Any] = {"steps": STEPS, "alpha": ALPHA}
    plan = resolve(method, options)
    step = flat_step(model, optimizer, plan, Threat("linf", EPS), mode=mode, backend="aot_eager")
    for x, y, start in batches(architecture):
        step(x, y, start=start)
    step.check()
    return model


def trained_by_hand(architecture: Architecture, method: str) -> nn.Module:
    model, optimizer = made(architecture)
    for x, y, start in batches(architecture):
        x_adv = attacked(model, x, y, start, method)
        model.train()
        moved = perturbed(model, x_adv, y) if method == "awp" else {}
        optimizer.zero_grad()
        if method == "trades":
            natural = model(x)
            divergence = kl(natural, model(x_adv))
            (functional.cross_entropy(natural, y) + BETA * divergence).backward()
            with torch.no_grad():
                model(x)  # the published code forwards x again
        else:
            functional.cross_entropy(model(x_adv), y).backward()
        optimizer.step()
        with torch.no_grad():
            for weight, v in moved.items():
                weight -= v
    return model


def attacked(model: nn.Module, x: Tensor, y: Tensor, start: Tensor, method: str) -> Tensor:
    model.train(method != "trades")
    natural = model(x).detach() if method == "trades" else None
    x_adv = (x + start).clamp(0, 1)
    for _ in range(STEPS):
        x_adv.requires_grad_()
        logits = model(x_adv)
        loss = functional.cross_entropy(logits, y) if natural is None else kl(natural, logits)
        (gradient,) = torch.autograd.grad(loss, x_adv)
        moved = x_adv.detach() + ALPHA * gradient.sign()
        x_adv = (x + (moved - x).clamp(-EPS, EPS)).clamp(0, 1)
    return x_adv


def kl(p: Tensor, q: Tensor) -> Tensor:
    return functional.kl_div(q.log_softmax(1), p.softmax(1), reduction="batchmean")


def perturbed(model: nn.Module, x_adv: Tensor, y: Tensor) -> dict[nn.Parameter, Tensor]:
    """Add AWP's v to every matrix and kernel. Running statistics are as before."""
    weights = [w for n, w in model.named_parameters() if "weight" in n and w.ndim > 1]
    buffers = [(buffer, buffer.clone()) for buffer in model.buffers()]
    gradients = torch.autograd.grad(
        functional.cross_entropy(model(x_adv), y), weights, allow_unused=True
    )
    found = {}
    with torch.no_grad():
        for buffer, before in buffers:
            buffer.copy_(before)
        for weight, gradient in zip(weights, gradients, strict=True):
            if gradient is not None and gradient.any():
                found[weight] = GAMMA * weight.norm() / gradient.norm() * gradient
                weight += found[weight]
    return found


def largest_difference(first: nn.Module, second: nn.Module) -> float:
    """Of weights and buffers, relative to 1 or to the tensor's largest value."""
    others = second.state_dict()
    return max(
        float((own - others[name]).abs().max() / others[name].abs().max().clamp(min=1))
        for name, own in first.state_dict().items()
        if own.numel()
    )


def has_moved(model: nn.Module, start: nn.Module) -> bool:
    pairs = zip(model.parameters(), start.parameters(), strict=True)
    return any(float((own - old).abs().max()) > 1e-6 for own, old in pairs if own.numel())


def assert_trains(name: str) -> None:
    architecture = ARCHITECTURES[name]
    for method in METHODS:
        eager = trained(architecture, method, "eager")
        assert largest_difference(eager, trained_by_hand(architecture, method)) < 1e-9, method
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
        compiled = trained(architecture, method, "compiled")
        assert torch._dynamo.utils.counters["stats"]["unique_graphs"] >= 2  # attack and outer pass
        assert largest_difference(compiled, eager) < 1e-9, method
        assert has_moved(eager, made(architecture)[0])


@pytest.mark.slow
@pytest.mark.parametrize("name", QUICKER)
def test_six_families_train(name: str) -> None:
    assert_trains(name)


@pytest.mark.long
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_family_trains(name: str) -> None:
    assert_trains(name)
