"""FGSM+ and APART against the algorithm written out, and properties that a wrong one violates."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from tiny import EPS, assert_same, sgd, tiny_batch, twin
from tiny_staged import (
    PAD,
    SAMPLES,
    StagedNet,
    put_back,
    staged_model,
    staged_step,
    view_of,
    window,
)
from torch import Tensor, nn
from torch.nn import functional

from fastadv import kernels
from fastadv.errors import UserError
from fastadv.models import build_model
from fastadv.models.blocks import perturbable_blocks
from fastadv.training.training_step import Step

TOTAL, COUNT = 6, 5
# Step sizes large enough that every term of every formula moves something within three steps.
LEARNED = {"step_size_init": 0.03, "omega_rate_init": 0.04, "omega_std": 0.5}
LEARNED |= {"step_size_lr": 0.02, "step_size_decay": 0.3, "pad": PAD}


def noisy_forward(
    model: StagedNet, x: Tensor, noise: list[Tensor | float], at: str
) -> tuple[Tensor, list[Tensor]]:
    """Logits with ``noise[b]`` added inside block b's branch, and the tensors it was added to.

    ``at="input"``: x_b itself, which the shortcut shares (without the noise).
    """
    x, entering = model.conv1(x), []
    for block, extra in zip(model.blocks, noise, strict=True):
        entering.append(x)
        h = functional.softplus(block.bn1(x + extra if at == "input" else x))
        if at == "conv1":
            entering[-1] = h
            h = h + extra
        x = x + block.conv2(functional.softplus(block.conv1(h)))
    return model.linear(functional.softplus(model.bn(x)).mean((2, 3))), entering


class ByHand:
    """APART as Alg. 1 and the released code have it, in plain autograd."""

    def __init__(self, model: StagedNet, omega: Tensor, at: str, layerwise: bool) -> None:
        self.model, self.omega, self.at, self.layerwise = model, omega, at, layerwise
        self.optimizer = sgd(model)
        count = 2 + (4 if layerwise else 0)
        self.alpha = torch.zeros(count, dtype=torch.float64)
        self.alpha[:2] = torch.tensor([0.03, 0.04])
        self.momentum, self.updates = torch.zeros_like(self.alpha), 0

    def step(self, x: Tensor, y: Tensor, index: Tensor, view: Any) -> None:
        omega = torch.stack([window(self.omega[i], view, row) for row, i in enumerate(index)])
        alpha = self.alpha.clone().requires_grad_()
        # First pass: signs at the start.
        x0 = (x + (alpha.detach()[1] * omega).clamp(-EPS, EPS)).clamp(0, 1).requires_grad_()
        logits, entering = noisy_forward(self.model, x0, [0.0] * 4, self.at)
        loss = functional.cross_entropy(logits, y)
        signs = [g.sign() for g in torch.autograd.grad(loss, [x0, *entering])]
        # Second pass: one backward for weights, step sizes and image.
        delta = (alpha[1] * omega).clamp(-EPS, EPS) + alpha[0] * signs[0]
        x1 = (x + delta.clamp(-EPS, EPS)).clamp(0, 1)
        x1.retain_grad()
        noise: list[Tensor | float] = [0.0] * 4
        if self.layerwise:
            noise = [a * sign for a, sign in zip(alpha[2:], signs[1:], strict=True)]
        self.optimizer.zero_grad()
        logits, _ = noisy_forward(self.model, x1, noise, self.at)
        functional.cross_entropy(logits, y).backward()
        self.optimizer.step()
        assert x1.grad is not None
        assert alpha.grad is not None
        with torch.no_grad():
            moved = omega + alpha[0] / (alpha[1] + 1e-7) * x1.grad.sign()
            for row, i in enumerate(index):
                put_back(self.omega[i], view, row, moved[row].clamp(-1, 1))
            # A triangular cycle of the rate, and CyclicLR's of the momentum.
            rising = 1 - abs(2 * self.updates / TOTAL - 1)
            push = alpha.grad - 0.3 * self.alpha
            self.momentum = (0.9 - 0.1 * rising) * self.momentum + push
            self.alpha = self.alpha + 0.02 * rising * self.momentum
        self.updates += 1


def batch_of(seed: int) -> tuple[Tensor, Tensor, Tensor]:
    x, y, _, _ = tiny_batch(COUNT, seed)
    return x, y, torch.randperm(SAMPLES, generator=torch.Generator().manual_seed(seed))[:COUNT]


def primed(step: Step, seed: int = 0) -> Step:
    """An adversary with its state allocated, as the first call does it."""
    x, y, _ = batch_of(seed)
    step._calls.prepare(x, y)
    return step


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("fgsm-plus", {}),
        ("apart", {}),
        ("apart", {"block_noise_at": "input"}),
        ("apart-no-layers", {}),
    ],
)
def test_three_steps(method: str, options: dict[str, str]) -> None:
    model = staged_model()
    step = primed(staged_step(model, method, total_steps=TOTAL, **LEARNED, **options))
    at = options.get("block_noise_at", "conv1")
    by_hand = ByHand(twin(model), step.state["omega"].clone(), at, method == "apart")
    for seed in range(3):
        x, y, index = batch_of(seed)
        view = view_of(COUNT, seed)
        step(x, y, index, view=view)
        by_hand.step(x, y, index, view)
        torch.testing.assert_close(step.state["omega"], by_hand.omega)
        torch.testing.assert_close(step.state["step_sizes"], by_hand.alpha)
        torch.testing.assert_close(step.state["step_size_momentum"], by_hand.momentum)
    assert_same(model, by_hand.model)
    if method == "apart":
        assert (by_hand.alpha[2:].abs() > 1e-5).all()  # the blocks' noise took part


def test_a_given_start_is_the_perturbation_in_pixels() -> None:
    x, y, index = batch_of(0)
    start = torch.full_like(x, EPS / 2)
    step = primed(staged_step(staged_model(), "fgsm-plus", **LEARNED))
    shifted: list[Tensor] = []

    def note(module: nn.Module, inputs: tuple[Tensor]) -> None:
        shifted.append(inputs[0].detach())

    step.model.register_forward_pre_hook(note)
    step(x, y, index, start=start)
    torch.testing.assert_close(shifted[0], (x + start).clamp(0, 1))


def test_learned_step_sizes_move_towards_a_larger_loss() -> None:
    """Without decay every learned step size first moves in the direction that raises the loss."""
    x, y, index = batch_of(0)
    x = 0.2 + 0.6 * x
    options = LEARNED | {"step_size_decay": 0.0, "step_size_schedule": "constant"}
    model = staged_model()
    step = primed(staged_step(model, "apart", optimizer=sgd(twin(model)), **options))
    before = step.state["step_sizes"].clone()
    first = float(step(x, y, index)["loss"])
    gained = step.state["step_sizes"] - before
    # Blocks start at 0 in a smooth network: the loss rises along the sign of its own gradient.
    assert (gained[2:] > 0).all()
    assert gained[0] > 0
    assert float(step(x, y, index)["loss"]) > first


def test_the_noise_inside_blocks_is_drawn_once_per_step(monkeypatch: pytest.MonkeyPatch) -> None:
    x, y, index = batch_of(0)
    step = primed(staged_step(staged_model(), "apart", **LEARNED))
    made: list[int] = []
    real = kernels.block_noise

    def noted(signs: Sequence[Tensor], alphas: Tensor) -> list[Tensor]:
        made.append(len(signs))
        return real(signs, alphas)

    monkeypatch.setattr(kernels, "block_noise", noted)
    for _ in range(2):
        step(x, y, index)
    assert made == [4, 4]


def test_omega_is_stored_at_the_pixels_it_was_cropped_from() -> None:
    """Another crop of a sample sees the update of the first one."""
    x, y, _, _ = tiny_batch(COUNT)
    index = torch.arange(COUNT)
    step = primed(staged_step(staged_model(), "fgsm-plus", **LEARNED))
    before = step.state["omega"].clone()
    view = view_of(COUNT)
    step(x, y, index, view=view)
    after = step.state["omega"]
    assert torch.equal(after[COUNT:], before[COUNT:])
    for row in range(COUNT):
        marked = torch.zeros_like(before[row])
        put_back(marked, view, row, torch.ones(3, 6, 6).double())
        changed = after[row] != before[row]
        assert not changed[marked == 0].any()
        assert changed[marked == 1].double().mean() > 0.9
    assert after.abs().max() <= max(1.0, float(before.abs().max()))


def test_without_learned_start_no_state_is_stored() -> None:
    x, y, _ = batch_of(0)
    step = staged_step(staged_model(), "apart-no-start", num_samples=None, **LEARNED)
    seen: list[Tensor] = []

    def note(module: nn.Module, inputs: tuple[Tensor]) -> None:
        seen.append(inputs[0].detach())

    step.model.register_forward_pre_hook(note)
    step(x, y)
    step(x, y)
    assert "omega" not in step.state
    # Four passes of the first look, then two per update: the first of each is at the image itself.
    assert torch.equal(seen[4], x)
    assert torch.equal(seen[6], x)
    assert not torch.equal(seen[5], x)


def test_hidden_decay_is_a_weight_optimizer_that_also_lists_the_step_sizes() -> None:
    x, y, index = batch_of(0)
    published = {"hidden_decay": 0.05, "hidden_decay_lr": 0.2, "step_size_lr": 0.0}
    step = primed(staged_step(staged_model(), "apart", total_steps=TOTAL, **LEARNED | published))
    values = nn.Parameter(step.state["step_sizes"].clone())
    weights = torch.optim.SGD([values], lr=0.0, momentum=0.9, weight_decay=0.05)
    for update in range(3):
        step(x, y, index)
        rising = 1 - abs(2 * update / TOTAL - 1)
        weights.param_groups[0] |= {"lr": 0.2 * rising, "momentum": 0.9 - 0.1 * rising}
        values.grad = torch.zeros_like(values)
        weights.step()
        torch.testing.assert_close(step.state["step_sizes"], values.detach())
    assert float(values[0].detach()) < 0.0299


def test_the_branchs_input_is_the_norm_before_its_first_convolution() -> None:
    at = {"conv1": "conv1", "input": "bn1"}
    for place, module in at.items():
        model = staged_model()
        step = staged_step(model, "apart", block_noise_at=place)
        with step.internals.net.block_hooks.on():
            hooked = [name for name, m in step.model.named_modules() if m._forward_pre_hooks]
        assert hooked == [f"layer{k}.0.{module}" for k in (1, 2, 3, 4)]


@pytest.mark.parametrize(
    ("network", "first"),
    [
        ("preact_resnet18", "layer1.0.bn1"),
        ("wide_resnet34_10", "block1.0.bn1"),
        ("wide_resnet34_1", "block1.0.bn1"),
        ("densenet121", "dense1.0.bn1"),
        ("resnet18", "layer1.0.conv1"),  # here the branch begins with the convolution
        ("resnet50", "layer1.0.conv1"),
    ],
)
def test_where_a_branch_begins(network: str, first: str) -> None:
    with torch.device("meta"):
        model = build_model(network)
    names = [name for name, _ in perturbable_blocks(model, at="input")]
    assert names[0] == first
    assert len(names) == len(perturbable_blocks(model))


def test_a_gradient_that_is_not_finite_changes_no_state() -> None:
    x, y, index = batch_of(0)
    step = primed(staged_step(staged_model(), "apart", **LEARNED))
    with torch.no_grad():
        step.model.get_parameter("linear.bias")[0] = float("inf")
    before = copy.deepcopy(step.state)
    step(x, y, index)
    for name, tensor in step.state.items():
        assert torch.equal(tensor, before[name]), name


def test_unsupported_settings_are_refused() -> None:
    x, y, index = batch_of(0)
    with pytest.raises(UserError, match="linf"):
        staged_step(staged_model(), "apart", norm="l2")(x, y, index)
    with pytest.raises(UserError, match="total_steps="):
        staged_step(staged_model(), "apart", total_steps=None)(x, y, index)
    with pytest.raises(UserError, match="update=False"):
        staged_step(staged_model(), "apart")(x, y, index, update=False)
