"""Layer groups and perturbed blocks given by module names, for networks that fastadv does not
know."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import ARCHITECTURES, CLASSES
from tiny import assert_same, flat_step
from torch import Tensor, nn
from torch.nn import functional

import fastadv
from fastadv.algorithms.resolution import resolve
from fastadv.errors import UserError
from fastadv.run.config_file import from_bytes
from fastadv.run.resolve import resolve_stored
from fastadv.threat import Threat

EPS, ALPHA, RATE = 0.03, 0.02, 0.05
LEARNED = {"step_size_init": 0.02, "omega_rate_init": 0.04, "omega_std": 0.5, "pad": 0}
LEARNED |= {"step_size_lr": 0.02, "step_size_decay": 0.3, "step_size_schedule": "constant"}
LAST = {"timm-resnet": ("layer4", "fc"), "timm-vit": ("blocks.1", "head")}


def made(name: str) -> nn.Module:
    torch.manual_seed(0)
    return ARCHITECTURES[name].build().double().train()


def images() -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(2)
    x = torch.rand(4, 3, 32, 32, generator=generator, dtype=torch.float64)
    start = EPS * (2 * torch.rand(x.shape, generator=generator, dtype=torch.float64) - 1)
    return x, torch.arange(4) % CLASSES, start


def one_step_attack(model: nn.Module, x: Tensor, y: Tensor, start: Tensor) -> Tensor:
    x_adv = (x + start).clamp(0, 1).requires_grad_()
    (gradient,) = torch.autograd.grad(functional.cross_entropy(model(x_adv), y), x_adv)
    moved = x_adv.detach() + ALPHA * gradient.sign()
    return (x + (moved - x).clamp(-EPS, EPS)).clamp(0, 1)


def inside(name: str, modules: tuple[str, ...]) -> bool:
    return name.startswith(tuple(f"{module}." for module in modules))


@pytest.mark.parametrize("name", LAST)
def test_a_learning_rate_of_named_modules_is_fixed(name: str) -> None:
    model, plain, chosen = made(name), made(name), LAST[name]
    groups = fastadv.param_groups(model, "fixed-lr", lr=RATE, groups=",".join(chosen))
    optimizer = torch.optim.SGD(groups, lr=RATE, momentum=0.9)
    step = fastadv.step(
        model, optimizer, "at-fix-lr-k", eps=EPS, layer_groups=chosen, steps=1, alpha=ALPHA
    )
    named = dict(plain.named_parameters())
    last = [parameter for key, parameter in named.items() if inside(key, chosen)]
    first = [parameter for key, parameter in named.items() if not inside(key, chosen)]
    assert last
    by_hand = torch.optim.SGD([{"params": first}, {"params": last}], lr=RATE, momentum=0.9)
    x, y, start = images()
    for update in range(3):
        for group in optimizer.param_groups:  # as a scheduler, which knows nothing of RAT
            group["lr"] = RATE * 0.1**update
        step(x, y, start=start)
        by_hand.param_groups[0]["lr"] = RATE * 0.1**update
        x_adv = one_step_attack(plain, x, y, start)
        by_hand.zero_grad()
        functional.cross_entropy(plain(x_adv), y).backward()
        by_hand.step()
    assert_same(model, plain)


@pytest.mark.parametrize("name", LAST)
def test_weights_of_named_modules_are_perturbed(name: str) -> None:
    model, plain, chosen = made(name), made(name), LAST[name]
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE)
    options = {"groups": chosen, "gamma": 0.05, "steps": 1, "alpha": ALPHA}
    step = fastadv.step(model, optimizer, "at-awp-k", eps=EPS, **options)
    x, y, start = images()
    step(x, y, start=start)

    x_adv = one_step_attack(plain, x, y, start)
    kept = [(buffer, buffer.clone()) for buffer in plain.buffers()]
    weights = [
        p for n, p in plain.named_parameters() if inside(n, chosen) and "weight" in n and p.ndim > 1
    ]
    found = torch.autograd.grad(functional.cross_entropy(plain(x_adv), y), weights)
    with torch.no_grad():
        for buffer, before in kept:
            buffer.copy_(before)
        moves = [
            0.05 * w.norm() / g.norm() * g if g.any() else g
            for w, g in zip(weights, found, strict=True)
        ]
        for weight, move in zip(weights, moves, strict=True):
            weight += move
    by_hand = torch.optim.SGD(plain.parameters(), lr=RATE)
    functional.cross_entropy(plain(x_adv), y).backward()
    by_hand.step()
    with torch.no_grad():
        for weight, move in zip(weights, moves, strict=True):
            weight -= move
    assert_same(model, plain)


def apart_step(model: nn.Module, blocks: Any) -> fastadv.Step:
    plan = resolve("apart", dict(LEARNED))
    return flat_step(
        model,
        torch.optim.SGD(model.parameters(), lr=RATE),
        plan,
        Threat("linf", EPS),
        mode="eager",
        num_samples=4,
        total_steps=4,
        steps_per_epoch=1,
        blocks=blocks,
    )


BLOCKS = {
    "timm-vit": (("blocks.*.mlp.fc1",), ("blocks.0.mlp.fc1", "blocks.1.mlp.fc1")),
    "timm-resnet": (("layer2.0", "layer4.0.conv2"), ("layer2.0", "layer4.0.conv2")),
}


@pytest.mark.parametrize("name", BLOCKS)
def test_apart_perturbs_the_named_blocks(name: str) -> None:
    """One update against the algorithm written with hooks."""
    blocks, expected = BLOCKS[name]
    model, plain = made(name), made(name)
    step = apart_step(model, blocks)
    x, y, _ = images()
    step._calls.prepare(x, y)  # the step sizes exist from the first batch on
    omega, alpha = step.state["omega"].clone(), step.state["step_sizes"].double().clone()
    step.state["step_sizes"][2:] = alpha[2:] = 0.01  # otherwise they begin at 0
    assert len(alpha) == 2 + len(expected)
    step(x, y, index=torch.arange(4))

    modules = [plain.get_submodule(each) for each in expected]
    entering: list[Tensor] = []
    hooks = [
        m.register_forward_pre_hook(lambda _, given: entering.append(given[0])) for m in modules
    ]
    x0 = (x + (alpha[1] * omega).clamp(-EPS, EPS)).clamp(0, 1).requires_grad_()
    loss = functional.cross_entropy(plain(x0), y)
    signs = [g.sign() for g in torch.autograd.grad(loss, [x0, *entering])]
    for hook in hooks:
        hook.remove()
    for module, size, sign in zip(modules, alpha[2:], signs[1:], strict=True):
        module.register_forward_pre_hook(
            lambda _, given, move=size * sign: (given[0] + move, *given[1:])
        )
    delta = (alpha[1] * omega).clamp(-EPS, EPS) + alpha[0] * signs[0]
    x1 = (x + delta.clamp(-EPS, EPS)).clamp(0, 1)
    functional.cross_entropy(plain(x1), y).backward()
    torch.optim.SGD(plain.parameters(), lr=RATE).step()
    assert_same(model, plain)
    assert len(signs) == 1 + len(expected)


def test_recognised_blocks_are_the_named_ones() -> None:
    models = []
    for blocks in (None, ("layer*.*.conv1",)):
        torch.manual_seed(3)
        models.append(made("timm-resnet"))
        step = apart_step(models[-1], blocks)
        for _ in range(2):
            step(*images()[:2], index=torch.arange(4))
    assert_same(*models, tolerance=0)


def test_a_network_without_known_stages_and_blocks_says_what_to_name() -> None:
    model = made("timm-vit")
    with pytest.raises(UserError, match="name modules in place of numbers, such as 'head'"):
        fastadv.param_groups(model, "rat-lr")
    with pytest.raises(UserError, match=r"Unknown module or parameter .* did you mean 'blocks\.1'"):
        fastadv.param_groups(model, "rat-lr", groups="block.1")
    with pytest.raises(UserError, match=r"name the modules .*blocks="):
        apart_step(model, None)
    with pytest.raises(UserError, match=r"Unknown module .* did you mean 'blocks\.0\.mlp\.fc[12]'"):
        apart_step(model, ("blocks.0.mlp.fc",))


SHORT = (
    *("--epochs", 1, "--limit", 64, "--test-limit", 16, "--test-attacks", "clean"),
    *("--select-attack", "fgsm", "--model", "timm:test_resnet", "--out", "run"),
)


@pytest.mark.parametrize(
    "words",
    [
        ("--method", "apart", "--blocks", "layer1.0.conv1,layer*.0.conv2"),
        ("--method", "rat-lr", "--layer-groups", "layer3,layer4,fc"),
        ("--method", "rat-wp", "--groups", "layer4", "--steps", 1),
    ],
)
def test_names_from_the_command_line_to_the_stored_run(
    words: tuple[Any, ...], fastadv_command: Callable[..., Any]
) -> None:
    done = fastadv_command("train", *words, *SHORT)
    assert done.code == 0, done.err
    path = Path("run/config.toml")
    config = resolve_stored(from_bytes(path.read_bytes(), path))
    option = words[2].removeprefix("--").replace("-", "_")
    held = config.blocks if option == "blocks" else config.options[option]
    assert held == tuple(words[3].split(","))


def test_misspelt_names_on_the_command_line(fastadv_command: Callable[..., Any]) -> None:
    for words, says in (
        (("--method", "apart", "--blocks", "layer1.0.conv7"), "did you mean"),
        (("--method", "rat-lr", "--layer-groups", "layr4"), "did you mean"),
        (("--method", "pgd", "--blocks", "layer1.0.conv1"), "omit it with pgd"),
    ):
        done = fastadv_command("train", *words, *SHORT)
        assert done.code == 2
        assert says in " ".join(done.err.split())
