"""``fastadv.step`` in a user's loop: it restores the model and works in any context."""

from __future__ import annotations

import copy

import pytest
import torch
from tiny import EPS, tiny_batch, tiny_model, tiny_step
from tiny_capture import capture
from torch import Tensor, nn

import fastadv


class Smooth(nn.Module):
    """No BatchNorm: a batch is the sum of its halves."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 6, 3, padding=1)
        self.linear = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(torch.tanh(self.conv(x)).mean((2, 3)))


def smooth_model(dtype: torch.dtype = torch.float64) -> Smooth:
    torch.manual_seed(3)
    return Smooth().to(dtype)


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def equal(first: nn.Module, second: nn.Module) -> bool:
    one, two = first.state_dict(), second.state_dict()
    return all(torch.equal(one[name], two[name]) for name in one)


@pytest.mark.parametrize("method", ["pgd", "trades", "awp"])
def test_flags_gradients_and_mode_are_as_before(method):
    model = tiny_model()
    model.bn1.eval()
    model.conv2.weight.requires_grad_(False)
    x, y, *_ = tiny_batch()
    before = [module.training for module in model.modules()]
    frozen, running = model.conv2.weight.clone(), model.bn1.running_mean.clone()
    with torch.no_grad():
        tiny_step(model, method, steps=2)(x, y)
        assert not torch.is_grad_enabled()
    assert [module.training for module in model.modules()] == before
    assert [n for n, p in model.named_parameters() if not p.requires_grad] == ["conv2.weight"]
    assert torch.equal(model.conv2.weight, frozen)
    assert torch.equal(model.bn1.running_mean, running)  # the user froze it


def test_a_model_in_eval_mode_is_trained_and_stays_in_eval_mode():
    model, twin = tiny_model().eval(), tiny_model()
    x, y, *_ = tiny_batch()
    for each in (model, twin):
        tiny_step(each, "pgd", steps=2)(x, y)
    assert not model.training
    assert equal(model, twin)


@pytest.mark.parametrize("method", ["pgd", "fgsm-n-advlc"])
def test_under_no_grad_and_inside_autocast_the_numbers_are_the_same(method, monkeypatch):
    monkeypatch.setattr("fastadv.engine.model.precision.cpu_multiplies", lambda _: True)
    options = {"steps": 2} if method == "pgd" else {}
    x, y, *_ = tiny_batch()
    x = x.float()
    results = []
    for surroundings in (torch.enable_grad(), torch.no_grad()):
        model = tiny_model().float()
        with surroundings:
            tiny_step(model, method, **options)(x, y)
        results.append(weights(model))
    assert all(torch.equal(results[0][name], results[1][name]) for name in results[0])
    inside, outside = tiny_model().float(), tiny_model().float()
    with torch.autocast("cpu", torch.bfloat16):
        tiny_step(inside, method, **options)(x, y)
    tiny_step(outside, method, amp=True, **options)(x, y)
    assert equal(inside, outside)


@pytest.mark.parametrize("surrounding", [False, True])
@pytest.mark.parametrize("mode", ["eager", "compiled", "captured"])
def test_perturbed_weights_are_used_in_low_precision(surrounding, mode, monkeypatch):
    """A low-precision copy made before the perturbation would hide it (``invalidate``)."""
    monkeypatch.setattr("fastadv.engine.model.precision.cpu_multiplies", lambda _: True)
    losses = {}
    for method in ("pgd", "awp"):
        torch.manual_seed(0)
        model = tiny_model().float()
        x, y, index, start = tiny_batch()
        changes = {} if method == "pgd" else {"gamma": 0.1}
        given = "eager" if mode == "captured" else mode
        options = {"amp": not surrounding, "steps": 1, "mode": given}
        step = tiny_step(model, method, **options, **changes)
        if mode == "captured":
            capture(step)
        with torch.autocast("cpu", torch.bfloat16, enabled=surrounding):
            losses[method] = step(x.float(), y, index, start=start.float())["loss"]
    assert losses["awp"] > losses["pgd"] * 1.01


@pytest.mark.parametrize("ends", [(4, 8), (3, 8), (1, 3, 8)])
@pytest.mark.parametrize("clip", [None, 0.01])
def test_an_update_of_several_calls_is_that_of_their_images_together(ends, clip):
    x, y, index, start = tiny_batch()
    model, twin = smooth_model(), smooth_model()
    step = tiny_step(model, "pgd", steps=2, max_grad_norm=clip)
    optimizer = torch.optim.SGD(twin.parameters(), lr=0.05, momentum=0.9, weight_decay=5e-4)
    for _ in range(2):  # the second update starts from zero
        before = copy.deepcopy(model)
        for first, last in zip((0, *ends), ends, strict=False):
            part = slice(first, last)
            assert equal(model, before)
            step(x[part], y[part], index[part], start=start[part], update=last == len(x))
        x_adv = fastadv.attack(twin, x, y, "pgd", eps=EPS, steps=2, start=start)
        optimizer.zero_grad()
        nn.functional.cross_entropy(twin(x_adv), y).backward()
        if clip is not None:
            nn.utils.clip_grad_norm_(twin.parameters(), clip)
        optimizer.step()
    for name, value in model.state_dict().items():
        torch.testing.assert_close(value, twin.state_dict()[name])


@pytest.mark.parametrize("method", ["awp", "apart", "free"])
def test_methods_that_cannot_accumulate_are_refused(method):
    x, y, index, _ = tiny_batch()
    model = fastadv.build_model("preact_resnet18", width=2)
    step = tiny_step(model, method, total_steps=4)
    with pytest.raises(fastadv.UserError, match="update=False"):
        step(x.float(), y, index, update=False)


def test_clipping_bounds_the_step():
    x, y, *_ = tiny_batch()
    model = smooth_model()
    before = weights(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    tiny_step(model, "fast", optimizer=optimizer, max_grad_norm=1e-3)(x, y)
    moved = [(model.state_dict()[name] - before[name]).square().sum() for name in before]
    torch.testing.assert_close(torch.stack(moved).sum().sqrt().item(), 1e-3, rtol=1e-4, atol=0)


def test_a_users_scaler_changes_nothing_but_the_scale():
    x, y, *_ = tiny_batch()
    model, twin = smooth_model(torch.float32), smooth_model(torch.float32)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    tiny_step(model, "fast", scaler=scaler)(x.float(), y)
    tiny_step(twin, "fast")(x.float(), y)
    for name, value in model.state_dict().items():
        torch.testing.assert_close(value, twin.state_dict()[name])
    assert scaler.get_scale() == 1024.0


def test_wrapped_models_are_stepped_inside():
    x, y, *_ = tiny_batch()
    model, twin = tiny_model(), tiny_model()
    wrapped = torch.compile(model, backend="eager")
    optimizer = torch.optim.SGD(wrapped.parameters(), lr=0.05, momentum=0.9, weight_decay=5e-4)
    tiny_step(wrapped, "pgd", steps=1, optimizer=optimizer)(x, y)
    tiny_step(twin, "pgd", steps=1)(x, y)
    assert equal(model, twin)
    with pytest.raises(fastadv.UserError, match="DataParallel"):
        tiny_step(nn.DataParallel(model), "pgd")


def test_a_bad_batch_masks_all_later_updates():
    x, y, index, _ = tiny_batch()
    model = fastadv.build_model("preact_resnet18", width=2)
    step = tiny_step(model, "apart", total_steps=9, averaging="ema")
    step(x.float(), y, index)
    good, state = weights(model), copy.deepcopy(step.state)
    broken = x.float().clone()
    broken[0, 0, 0, 0] = float("nan")  # only the first call looks at its images
    step(broken, y, index)
    step(x.float(), y, index)
    assert all(torch.equal(value, good[name]) for name, value in model.state_dict().items())
    assert all(torch.equal(value, state[name]) for name, value in step.state.items())
    with pytest.raises(fastadv.TrainingError, match="at step 1;"):
        step.check()


def sentence(match: str):
    return pytest.raises(fastadv.UserError, match=match)


def test_mistakes_that_the_first_call_refuses():
    x, y, index, _ = tiny_batch()
    model = tiny_model()
    with sentence(r"lie in \[0, 1\]"):
        tiny_step(model, "pgd")(x + 0.5, y)
    with sentence("Labels must lie in"):
        tiny_step(model, "pgd")(x, y + 3)
    with sentence("float images"):
        tiny_step(model, "pgd")(x[0], y)
    with sentence("int64 labels"):
        tiny_step(model, "pgd")(x, y.float())
    with sentence("batch of one"):
        tiny_step(model, "pgd")(x[:1], y[:1])
    with sentence("num_classes is 3"):
        tiny_step(model, "pgd", num_classes=3)(x, y)
    with sentence("pass index="):
        tiny_step(model, "te", total_steps=4, steps_per_epoch=2)(x, y)
    with sentence("outside the 20 samples"):
        tiny_step(model, "te", total_steps=4, steps_per_epoch=2)(x, y, index + 20)
    with sentence("total_steps="):
        tiny_step(fastadv.build_model("preact_resnet18", width=2), "fgsm-plus")(x.float(), y, index)
    with sentence("no residual blocks"):
        tiny_step(smooth_model(), "apart")
    with sentence("Linf ball"):
        tiny_step(model, "fgsm-plus", norm="l2", total_steps=3)(x, y, index)


def test_apart_on_a_custom_network_by_module_names():
    x, y, index, _ = tiny_batch()
    model = tiny_model()
    step = tiny_step(model, "apart", total_steps=4)  # tiny_step names the block: conv2
    step(x, y, index)
    step(x, y, index)
    assert step.state["step_sizes"].shape == (3,)  # input, omega, one block
    assert step.state["step_sizes"][2] != 0


def test_options_with_a_typo_name_the_nearest():
    optimizer = torch.optim.SGD(tiny_model().parameters(), lr=0.1)
    with sentence("did you mean 'steps'"):
        fastadv.step(tiny_model(), optimizer, "pgd", stpes=3)
    with sentence("did you mean 'awp'"):
        fastadv.step(tiny_model(), optimizer, "pgd", weights="apw")
