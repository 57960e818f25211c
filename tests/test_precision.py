"""Precision: float32 eager and compiled, loss scales without an effect, bf16 in training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from bench_script import script
from tiny import assert_same, flat_step, tiny_batch, tiny_model, tiny_step
from tiny_capture import capture
from torch import Tensor, nn
from torch.nn import functional

import fastadv
from fastadv.algorithms.resolution import resolve
from fastadv.data import load
from fastadv.engine.model.precision import autocast, cpu_multiplies
from fastadv.run.request import RunRequest
from fastadv.threat import Threat
from fastadv.training.training_step import Step

RADIUS = 0.2
BATCH = 256
# A sign step doubles what rounding changed whenever a pixel turns: only where training is gentle
# does a curve of 50 losses show more than that, for the learned attack as for the other.
GENTLE: dict[str, dict[str, Any]] = {
    "pgd": {"steps": 3},
    "apart": {"step_size_init": 0.05, "omega_rate_init": 0.02, "omega_std": 1.0},
}


@pytest.fixture(scope="module")
def warm() -> dict[str, Tensor]:
    """Weights of a small network that has seen a few epochs of adversarial training."""
    images, labels = digits()
    model = small()
    step = fastadv.step(model, rates(model, 0.05), "pgd", eps=RADIUS, steps=3, mode="eager")
    for epoch in range(6):
        order = torch.randperm(len(images), generator=torch.Generator().manual_seed(epoch))
        for rows in order.split(128)[:-1]:
            step(images[rows], labels[rows])
    return model.state_dict()


def digits() -> tuple[Tensor, Tensor]:
    data = load("digits")
    return data.train_images.float() / 255, data.train_labels


def small() -> nn.Module:
    torch.manual_seed(0)
    return fastadv.build_model("preact_resnet18", in_channels=1, width=8, depths=(1, 1, 1, 1))


def rates(model: nn.Module, lr: float) -> torch.optim.SGD:
    return torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9, weight_decay=5e-4)


def fifty_losses(
    method: str,
    weights: dict[str, Tensor],
    mode: str = "eager",
    backend: str = "aot_eager",
    layout: torch.memory_format = torch.contiguous_format,
    updates: int = 50,
) -> tuple[Tensor, list[Tensor]]:
    """Losses of ``updates`` updates, and the result of the attack's first step: x_adv or signs."""
    images, labels = digits()
    model = small()
    model.load_state_dict(weights)
    step = flat_step(
        model.to(memory_format=layout),
        rates(model, 0.001),
        resolve(method, GENTLE[method]),
        Threat("linf", RADIUS),
        mode=mode,
        backend=backend,
        num_samples=len(images),
        total_steps=2000,
    )
    passes: list[Any] = []
    net = step.internals.net
    run = net.run
    net.run = lambda region, *inputs: passes.append(run(region, *inputs)) or passes[-1]
    losses, generator = [], torch.Generator().manual_seed(1)
    for _ in range(updates):
        rows = torch.randint(0, len(images), (BATCH,), generator=generator)
        losses.append(step(images[rows].to(memory_format=layout), labels[rows], rows)["loss"])
    first = passes[0]
    return torch.stack(losses), [first] if isinstance(first, Tensor) else list(first)


def share_turned(first: list[Tensor], second: list[Tensor]) -> float:
    """The largest share of elements that stepped the other way: pixels step by RADIUS/4."""
    pairs = zip(first, second, strict=True)
    return max(((a - b).abs() > RADIUS / 8).float().mean().item() for a, b in pairs)


def test_a_compiled_float32_step_flips_almost_no_pixel() -> None:
    weights = small().state_dict()
    _, eager = fifty_losses("pgd", weights, updates=1)
    _, compiled = fifty_losses("pgd", weights, "compiled", updates=1)
    assert share_turned(eager, compiled) <= 0.001


@pytest.mark.slow
@pytest.mark.parametrize("method", GENTLE)
def test_fifty_compiled_float32_losses_differ_no_more_than_by_another_layout(
    method: str, warm: dict[str, Tensor]
) -> None:
    """Three times leaves room for chance: a bit more or less in the weights gives 0.6 to 1.9 times
    the layout's distance, a step of the attack 1 % too large 6 times and more."""
    eager, stepped = fifty_losses(method, warm)
    layout, _ = fifty_losses(method, warm, layout=torch.channels_last)
    compiled, others = fifty_losses(method, warm, "compiled", "inductor")
    assert share_turned(stepped, others) <= 0.001
    rounding = (layout - eager).abs().mean()
    assert rounding > 0
    assert (compiled - eager).abs().mean() <= 3 * rounding


# What is made of a gradient's size, and not only of its direction.
SIZED: dict[str, dict[str, Any]] = {
    name: {"method": "fgsm-n", "regularizer": name}
    for name in ("igr", "cure", "gradalign", "logitalign")
}
SIZED["igr"]["reg_weight"] = 10  # a thousand overflows float16 at these scales: a skipped step
SIZED["apart"] = {"method": "apart", "total_steps": 3, "step_size_lr": 0.01}
MODES = ["eager", "captured", pytest.param("compiled", marks=pytest.mark.slow)]


def sized_step(model: nn.Module, name: str, mode: str, scale: float, **more: Any) -> Step:
    scaler = torch.amp.GradScaler("cpu", init_scale=scale)
    given = "eager" if mode == "captured" else mode
    step = tiny_step(model, mode=given, scaler=scaler, **SIZED[name], **more)
    return capture(step) if mode == "captured" else step


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", SIZED)
def test_a_loss_scale_leaves_no_trace(name: str, mode: str) -> None:
    """Both scales at work: of the outer loss, and of a gradient that is differentiated again."""
    models, states = [], []
    for scale in (1.0, 1024.0):
        models.append(tiny_model())
        step = sized_step(models[-1], name, mode, scale)
        step.internals.net.loss_scale = lambda count, scale=scale: scale * count
        for seed in range(3):
            x, y, index, _ = tiny_batch(seed=seed)
            step(x, y, index)
        assert step.internals.updater.scaler.get_scale() == scale
        states.append(dict(step.state))
    assert_same(*models, 1e-9)
    torch.testing.assert_close(*states, rtol=1e-9, atol=1e-12)
    assert not torch.equal(models[0].conv1.weight, tiny_model().conv1.weight)


@pytest.mark.parametrize("mode", MODES[:2])
@pytest.mark.parametrize("name", SIZED)
def test_float16_steps_are_near_float32_ones(
    name: str, mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Computing in a half type that a CPU only emulates is slow, and here exactly what is wanted.
    monkeypatch.setattr("fastadv.engine.model.precision.cpu_multiplies", lambda _: True)
    moved, momenta = [], []
    for amp, scale in ((False, 1.0), (True, 128.0)):
        model = tiny_model().float()
        before = nn.utils.parameters_to_vector(model.parameters()).detach()
        low = {"amp": True, "amp_dtype": "fp16"} if amp else {}
        step = sized_step(model, name, mode, scale, **low)
        x, y, index, _ = tiny_batch()
        step(x.float(), y, index)
        assert step.internals.updater.scaler.get_scale() == scale
        moved.append(nn.utils.parameters_to_vector(model.parameters()).detach() - before)
        momenta.append(step.state.get("step_size_momentum", torch.zeros(1)))
    assert (moved[1] - moved[0]).norm() < 0.05 * moved[0].norm()
    assert (momenta[1] - momenta[0]).norm() <= 0.05 * momenta[0].norm()


@pytest.mark.parametrize("method", ["awp", "rwp"])
@pytest.mark.parametrize("mode", MODES[:2])
def test_float16_keeps_the_direction_of_perturbed_weights(
    method: str, mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of samples that are classified with confidence: gradients that float16 has no numbers for."""
    monkeypatch.setattr("fastadv.engine.model.precision.cpu_multiplies", lambda _: True)
    x, _, index, _ = tiny_batch()
    y = torch.zeros(len(x), dtype=torch.int64)
    directions = []
    for amp in (False, True):
        model = tiny_model().float()
        with torch.no_grad():
            model.linear.bias[0] += 13
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**16)
        given = {"amp": True, "amp_dtype": "fp16"} if amp else {}
        given |= {"accumulate": "renormalise"} if method == "rwp" else {}
        step = tiny_step(model, method, steps=1, scaler=scaler, mode="eager", **given)
        if mode == "captured":
            step = capture(step)
        step(x.float(), y, index)
        assert scaler.get_scale() == 2.0**16
        directions.append(step.plan.weights.moved_by)
    for exact, found in zip(*directions, strict=True):
        alike = functional.cosine_similarity(exact.flatten(), found.flatten(), dim=0)
        assert exact.any()
        assert alike > 0.99


@pytest.mark.parametrize("surrounding", [False, True])
def test_captured_bf16_steps_see_every_state_of_the_weights(
    surrounding: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three updates: the weights a replay perturbs are not those that were recorded."""
    monkeypatch.setattr("fastadv.engine.model.precision.cpu_multiplies", lambda _: True)
    losses: dict[str, list[Tensor]] = {"eager": [], "captured": []}
    for mode, found in losses.items():
        model = tiny_model().float()
        step = tiny_step(model, "awp", amp=not surrounding, steps=2, gamma=0.1)
        if mode == "captured":
            capture(step)
        for seed in range(3):
            x, y, index, _ = tiny_batch(seed=seed)
            with torch.autocast("cpu", torch.bfloat16, enabled=surrounding):
                found.append(step(x.float(), y, index)["loss"])
    assert torch.equal(torch.stack(losses["eager"]), torch.stack(losses["captured"]))


def test_a_weight_that_changed_inside_of_the_callers_autocast_is_cast_anew() -> None:
    """Autocast's own cache keeps a weight's copy until the caller's region ends."""
    weight, x = nn.Parameter(torch.ones(3, 3)), torch.ones(1, 3)
    found = []
    with torch.autocast("cpu", torch.bfloat16):
        for _ in range(2):
            with autocast(torch.device("cpu"), torch.bfloat16):
                found.append(functional.linear(x, weight))
            with torch.no_grad():
                weight.mul_(2)
    assert torch.equal(found[1], 2 * found[0])


def test_differences_of_pairs_are_in_points() -> None:
    pairs = [{"fp32": {"pgd-20": 0.5}, "bf16": {"pgd-20": value}} for value in (0.51, 0.47, 0.5)]
    told = script("precision").summary(pairs, "pgd-20")
    assert told["differences"] == [1.0, -3.0, 0.0]
    assert told["mean"] == pytest.approx(-2 / 3, abs=1e-3)
    # The deviation of 1, -3 and 0 is the root of 13/3; of their mean it is that over the root of 3.
    assert told["standard_error"] == pytest.approx((13 / 9) ** 0.5, abs=1e-3)


@pytest.mark.long
@pytest.mark.skipif(
    not cpu_multiplies(torch.bfloat16), reason="--amp is float32 on a CPU without bf16 instructions"
)
def test_bf16_training_is_as_robust_as_float32(tmp_path: Path) -> None:
    """Five paired seeds of APART; ``bench/precision.py`` measures runs of full length."""
    precision = script("precision")
    config = RunRequest(method="apart", epochs=15, eval_every=1000, test_attacks="pgd-20")
    pairs = [precision.pair(config, seed, tmp_path) for seed in range(5)]
    told = precision.summary(pairs, "pgd-20")
    lost = -told["mean"]
    assert lost < 1.5
    assert lost < 2 * told["standard_error"]
    assert any(told["differences"]), "--amp changed nothing"
