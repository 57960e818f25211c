"""Forward passes of published codes that only move BatchNorm's statistics: against those codes'
updates, written as plain loops."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from test_distributed import free_port
from test_objectives import NormByHand, OwnStatistics, SharesNorm, drawn
from tiny import EPS, TinyNet, assert_same, sgd, tiny_batch, tiny_model, tiny_step, twin
from tiny_capture import DeviceNetwork, capture
from torch import Tensor, distributed, nn
from torch.nn import functional
from two_processes import in_two_processes

from fastadv.algorithms.resolution import resolve
from fastadv.engine.model.network import Network
from fastadv.engine.process.distributed import leave
from fastadv.errors import UserError

ALPHA, STEPS, GAMMA, UPDATES = 0.04, 3, 0.02, 3
RICE = ("adversarial", "adversarial", "natural")
RWP = RICE[:2]
CLEAN = ("adversarial", "natural")
MODES = ["eager", "captured", pytest.param("compiled", marks=pytest.mark.slow)]


def attacked(
    model: nn.Module, x: Tensor, y: Tensor, start: Tensor, bn: str, *, logged: bool
) -> Tensor:
    """The attack of robust_overfitting, which ends with a forward pass of its result."""
    model.train(bn == "train")
    delta = start.clamp(-EPS, EPS).clamp(-x, 1 - x)
    for _ in range(STEPS):
        delta.requires_grad_()
        loss = functional.cross_entropy(model(x + delta), y)
        (gradient,) = torch.autograd.grad(loss, delta)
        delta = (delta.detach() + ALPHA * gradient.sign()).clamp(-EPS, EPS).clamp(-x, 1 - x)
    if logged:
        with torch.no_grad():
            model(x + delta)
    model.train()
    return x + delta


def perturbed_by(model: TinyNet, x_adv: Tensor, y: Tensor) -> dict[str, Tensor]:
    """AWP's perturbation of each weight, from a proxy whose buffers are thrown away."""
    proxy = copy.deepcopy(model)
    proxy.zero_grad()
    functional.cross_entropy(proxy(x_adv), y).backward()
    found = {}
    for name, weight in model.named_parameters():
        if weight.ndim > 1:
            gradient = proxy.get_parameter(name).grad
            assert gradient is not None
            found[name] = GAMMA * weight.detach().norm() / gradient.norm() * gradient
    return found


def published(
    model: TinyNet, passes: tuple[str, ...], *, awp: bool = False, bn: str = "train"
) -> None:
    """``UPDATES`` updates of robust_overfitting, or of AWP's code made from it."""
    optimizer = sgd(model)
    for update in range(UPDATES):
        x, y, _, start = tiny_batch(seed=update)
        x_adv = attacked(model, x, y, start, bn, logged=passes.count("adversarial") == 2)
        moved = perturbed_by(model, x_adv, y) if awp else {}
        with torch.no_grad():
            for name, change in moved.items():
                model.get_parameter(name).add_(change)
        optimizer.zero_grad()
        functional.cross_entropy(model(x_adv), y).backward()
        optimizer.step()
        with torch.no_grad():
            for name, change in moved.items():
                model.get_parameter(name).sub_(change)
            if passes[-1] == "natural":
                model(x)


def ours(model: TinyNet, passes: tuple[str, ...], mode: str = "eager", **options: Any) -> Any:
    made = "compiled" if mode == "compiled" else "eager"
    known = {"steps": STEPS, "alpha": ALPHA, "bn_passes": passes} | options
    step = tiny_step(model, mode=made, **known)
    if mode == "captured":
        capture(step)
    for update in range(UPDATES):
        x, y, index, start = tiny_batch(seed=update)
        step(x, y, index, start=start)
    assert step.healthy()
    return step


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("passes", [RICE, RWP, CLEAN, ("adversarial",)])
def test_the_statistics_are_those_of_the_published_passes(
    passes: tuple[str, ...], mode: str
) -> None:
    model, by_hand = tiny_model(), tiny_model()
    published(by_hand, passes)
    ours(model, passes, mode)
    assert_same(model, by_hand, 1e-12)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("passes", [RICE, RWP])
def test_with_perturbed_weights_the_logged_pass_is_at_the_weights_themselves(
    passes: tuple[str, ...], mode: str
) -> None:
    model, by_hand = tiny_model(), tiny_model()
    published(by_hand, passes, awp=True)
    ours(model, passes, mode, weights="awp", gamma=GAMMA)
    assert_same(model, by_hand, 1e-10)


def test_an_attack_in_eval_mode_logs_in_eval_mode() -> None:
    model, by_hand = tiny_model(), tiny_model()
    published(by_hand, RICE, bn="eval")
    ours(model, RICE, attack_bn="eval")
    assert_same(model, by_hand, 1e-12)


def test_the_default_passes_differ_in_the_statistics_alone() -> None:
    first, second = tiny_model(), tiny_model()
    ours(first, ("adversarial",))
    ours(second, RICE)
    for name, weight in first.named_parameters():
        torch.testing.assert_close(weight, second.get_parameter(name), rtol=1e-12, atol=1e-12)
    assert (first.bn1.running_mean - second.bn1.running_mean).abs().max() > 1e-3


def test_one_pass_stands_for_two_where_their_weights_are_the_same() -> None:
    made = {}
    for passes in (("adversarial",), RWP, RICE):
        step = ours(tiny_model(), passes)
        count: list[bool] = []
        step.model.register_forward_hook(lambda module, *_, c=count: c.append(module.training))
        x, y, index, start = tiny_batch()
        step(x, y, index, start=start)
        made[passes] = len(count)
    assert made[RWP] == made["adversarial",] == STEPS + 1
    assert made[RICE] == STEPS + 2


@pytest.mark.parametrize("momentum", [None, 1.0])
@pytest.mark.parametrize("mode", ["eager", "captured"])
def test_momenta_without_an_equivalent(momentum: float | None, mode: str) -> None:
    model, by_hand = tiny_model(), tiny_model()
    for each in (model, by_hand):
        each.bn1.momentum = momentum
    published(by_hand, RICE)
    ours(model, RICE, mode)
    assert_same(model, by_hand, 1e-12)


@pytest.mark.parametrize("kind", [SharesNorm, NormByHand, OwnStatistics])
@pytest.mark.parametrize("mode", ["eager", pytest.param("compiled", marks=pytest.mark.slow)])
def test_statistics_that_no_momentum_can_reproduce(kind: type[TinyNet], mode: str) -> None:
    model, by_hand = drawn(kind), drawn(kind)
    published(by_hand, RICE)
    ours(model, RICE, mode)
    assert_same(model, by_hand, 1e-12)


def test_the_clean_pass_is_at_the_new_weights_in_low_precision_too() -> None:
    """The copies of the weights that the outer pass used are stale then."""
    x, y, index, _ = tiny_batch()
    model = tiny_model().float()
    step = tiny_step(
        model, adversary="none", bn_passes=CLEAN, amp=True, amp_dtype="bf16",
        optimizer=torch.optim.SGD(model.parameters(), lr=1.0),
    )  # fmt: skip
    twin_model = twin(model)
    step(x.float(), y, index)
    optimizer = torch.optim.SGD(twin_model.parameters(), lr=1.0)
    with torch.autocast("cpu", torch.bfloat16):
        loss = functional.cross_entropy(twin_model(x.float()).float(), y)
    loss.backward()
    optimizer.step()
    stale = copy.deepcopy(twin_model.state_dict())
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        twin_model(x.float())
    assert_same(model, twin_model, 1e-4)
    before = twin_model.bn1.running_mean
    assert (before - stale["bn1.running_mean"]).abs().max() > 1e-3


@pytest.mark.parametrize("network", [Network, DeviceNetwork])
def test_an_update_that_does_not_count_leaves_the_statistics(network: type[Network]) -> None:
    x, y, index, start = tiny_batch()
    step = tiny_step(tiny_model(), bn_passes=RICE)
    step.internals.net.__class__ = network
    step(x, y, index, start=start)
    with torch.no_grad():
        step.model.linear.bias[0] = float("nan")
    before = {name: buffer.clone() for name, buffer in step.model.named_buffers()}
    step(x, y, index, start=start)
    assert not step.healthy()
    for name, buffer in step.model.named_buffers():
        assert torch.equal(buffer, before[name]), name


def test_the_clean_pass_waits_for_the_optimizer() -> None:
    x, y, index, _ = tiny_batch()
    step = tiny_step(tiny_model(), adversary="none", bn_passes=CLEAN)
    step(x, y, index)
    before = int(step.model.bn1.num_batches_tracked)
    step(x[:4], y[:4], index[:4], update=False)
    assert int(step.model.bn1.num_batches_tracked) == before + 1
    step(x[4:], y[4:], index[4:])
    assert int(step.model.bn1.num_batches_tracked) == before + 3


def test_free_ends_each_of_its_updates_with_the_clean_pass() -> None:
    x, y, index, _ = tiny_batch()
    model, by_hand = tiny_model(), tiny_model()
    optimizer, delta = sgd(by_hand), torch.zeros_like(x)
    tiny_step(model, "free", replays=2, box="image", bn_passes=CLEAN)(x, y, index)
    for _ in range(2):
        delta.requires_grad_()
        optimizer.zero_grad()
        functional.cross_entropy(by_hand((x + delta).clamp(0, 1)), y).backward()
        optimizer.step()
        assert delta.grad is not None
        delta = (delta.detach() + EPS * delta.grad.sign()).clamp(-EPS, EPS)
        with torch.no_grad():
            by_hand(x)
    assert_same(model, by_hand, 1e-12)


def test_a_resumed_run_is_bit_for_bit_the_same() -> None:
    x, y, index, start = tiny_batch()
    step = ours(tiny_model(), RICE)
    other = tiny_step(twin(step.model), steps=STEPS, alpha=ALPHA, bn_passes=RICE)
    other.load_state_dict(copy.deepcopy(step.state_dict()))
    other.optimizer.load_state_dict(copy.deepcopy(step.optimizer.state_dict()))
    for each in (step, other):
        each(x, y, index, start=start)
    assert_same(step.model, other.model, 0)


@pytest.mark.parametrize(
    "passes", [("natural",), ("natural", "adversarial"), ("adversarial",) * 3, RICE + CLEAN[1:]]
)
def test_other_orders_are_refused(passes: tuple[str, ...]) -> None:
    with pytest.raises(UserError, match="bn_passes"):
        resolve("pgd", {"bn_passes": passes})


def test_another_objective_takes_its_own_passes() -> None:
    form = {"variant": "robust-overfitting"}
    assert resolve("pgd", form).options["bn_passes"] == RICE
    trades = {"objective": "trades", "attack_loss": "kl"}
    for row in ("pgd", "awp"):
        own = resolve(row, trades).options["bn_passes"]
        variant = form if row == "pgd" else {"variant": "awp"}
        assert resolve(row, variant | trades).options["bn_passes"] == own
    plain = {"objective": "ce", "attack_loss": "ce"}
    found = resolve("trades", {"variant": "memorization"} | plain).options
    assert found["bn_passes"] == ("adversarial",)


def by_halves(rank: int, world: int) -> dict[str, Tensor]:
    """Weights and statistics after updates by the passes of robust_overfitting."""
    step = tiny_step(tiny_model(), steps=STEPS, alpha=ALPHA, bn_passes=RICE)
    share = 8 // world
    mine = slice(share * rank, share * rank + share)
    for update in range(UPDATES):
        x, y, index, start = tiny_batch(seed=update)
        step(x[mine], y[mine], index[mine], start=start[mine])
    return step.model.state_dict()


def halves_worker(rank: int, port: int, out: str) -> None:
    address = f"tcp://127.0.0.1:{port}"
    distributed.init_process_group("gloo", init_method=address, rank=rank, world_size=2)
    torch.save(by_halves(rank, 2), f"{out}.{rank}")
    leave()


@pytest.mark.slow
def test_two_processes_have_the_same_statistics(tmp_path: Path) -> None:
    """The mean of both, as after the passes before the optimizer's step."""
    out = str(tmp_path / "half")
    in_two_processes(halves_worker, free_port(), out)
    first, second = (torch.load(f"{out}.{rank}") for rank in range(2))
    for name, value in first.items():
        assert torch.equal(value, second[name]), name
