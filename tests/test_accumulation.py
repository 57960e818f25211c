"""Several calls with ``update=False`` and one that updates are one call with all their images.

The network normalises each image by itself (GroupNorm), so that only the method can couple the
images of a batch. Every recipe computes the same or is refused.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from every_recipe import SHORTER
from tiny import EPS, LEARNING, flat_step, tiny_batch
from tiny_capture import capture
from tiny_staged import StagedNet, view_of
from torch import nn

from fastadv.algorithms.recipes.table import METHODS
from fastadv.algorithms.resolution import resolve
from fastadv.data.view import View
from fastadv.errors import TrainingError, UserError
from fastadv.threat import Threat
from fastadv.training.training_step import Step

SAMPLES, UPDATES = 40, 3
EVEN, UNEVEN = (8, 8, 8, 8), (5, 8, 2, 1)
# Everything that begins later begins at once.
AT_ONCE = dict.fromkeys(("sat_start", "gairat_start", "te_start", "te_end", "warmup_epochs"), 0)
# The parts whose loss or state belongs to a whole batch.
COUPLED = {"fgsm-plus", "apart", "free", "awp", "rwp", "gairat", "self-adaptive"}
COUPLED |= {"abnormal", "smooth-convergence", "fgsm-uap", "fgsm-cuap", "fgsm-fuap"}
COUPLED |= {"igr", "gradalign", "elle-a", "nuclear", "fgsm-mep", "fgsm-bp"}
QUICK = {"pgd", "fgsm", "n-fgsm", "trades", "trades-te", "atta-1", "fgsm-n-consistency"}
QUICK |= {"pgd-logitalign", "label-smoothing"}


def network(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    model = StagedNet()
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, nn.BatchNorm2d):
                setattr(module, name, nn.GroupNorm(1, child.num_features))
    model.double()
    for parameter in model.parameters():
        parameter.data.add_(0.3 * torch.randn_like(parameter))
    return model


def step_on(
    model: nn.Module, method: str = "pgd", norm: str = "linf", mode: str = "eager", **options: Any
) -> Step:
    settings = {"num_samples": SAMPLES, "total_steps": 8, "steps_per_epoch": 2, "seed": 3}
    own = ("max_grad_norm", "steps_per_epoch", "before_update", "scaler", "amp", "amp_dtype")
    settings |= {name: options.pop(name) for name in own if name in options}
    known = resolve(method, options).options
    options = {k: v for k, v in (SHORTER | AT_ONCE).items() if k in known} | options
    if "teachers" in known:
        options["teachers"] = [network(7).eval(), network(8).eval()]
    if "helper" in known:
        options["helper"] = network(7).eval()
    plan = resolve(method, options)
    groups = plan.layers.optimizer_groups(model, LEARNING["lr"])
    optimizer = torch.optim.SGD(groups, **LEARNING)
    blocks = [f"layer{k}.0.conv1" for k in range(1, 5)]
    settings["blocks"] = blocks if "block_gradients" in plan.needs else None
    return flat_step(
        model, optimizer, plan, Threat(norm, EPS), mode=mode, backend="aot_eager", **settings
    )


def update(step: Step, number: int, sizes: tuple[int, ...], *, index: bool = True) -> None:
    """Update ``number``, with the images of all calls the same whatever the ``sizes`` of the
    calls."""
    count = sum(sizes)
    x, y, *_ = tiny_batch(count, seed=number)
    second = tiny_batch(count, seed=100 + number)[0]
    rows = torch.randperm(SAMPLES, generator=torch.Generator().manual_seed(number))[:count]
    view = view_of(count, number)
    end = 0
    dtype = next(step.model.parameters()).dtype
    for size in sizes:
        begin, end = end, end + size
        part = slice(begin, end)
        more: dict[str, Any] = {"update": end == count}
        if "second_view" in step.plan.needs:
            more["second"] = second[part].to(dtype)
        if index:
            more["view"] = View(view.top[part], view.left[part], view.flip[part])
        step(x[part].to(dtype), y[part], rows[part] if index else None, **more)


def trained(make: Callable[[nn.Module], Step], sizes: tuple[int, ...], **given: Any) -> Any:
    model = network()
    step = make(model)
    for number in range(UPDATES):
        update(step, number, sizes, **given)
    return {**model.state_dict(), **step.state}


def assert_as_one_call(
    make: Callable[[nn.Module], Step],
    sizes: tuple[int, ...] = UNEVEN,
    tolerance: float = 1e-12,
    **given: Any,
) -> None:
    parts, whole = trained(make, sizes, **given), trained(make, (sum(sizes),), **given)
    assert parts.keys() == whole.keys()
    for name, value in whole.items():
        torch.testing.assert_close(parts[name], value, rtol=0, atol=tolerance, msg=name)
    start = network().state_dict()
    assert any(not torch.equal(whole[name], value) for name, value in start.items())


def couples(method: str) -> bool:
    recipe = METHODS[method]
    parts = set(recipe.parts().values())
    options = recipe.all_options()
    advlc = "advlc" in parts and options.get("kind", "top-n") in ("top-n", "nuclear")
    return bool(parts & COUPLED) or advlc or "leave_out_below" in options


def tiered(name: str) -> object:
    return pytest.param(name, marks=() if name in QUICK or couples(name) else pytest.mark.slow)


@pytest.mark.parametrize("method", [tiered(name) for name in METHODS])
def test_every_recipe_is_that_of_one_call_or_refused(method: str) -> None:
    if couples(method):
        model = network()
        before = {name: value.clone() for name, value in model.state_dict().items()}
        with pytest.raises(UserError, match=r"update=False is not possible with .*: give all"):
            update(step_on(model, method), 0, UNEVEN)
        assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
        return
    for sizes in (EVEN, UNEVEN):
        assert_as_one_call(lambda model: step_on(model, method), sizes)


OPTIONS: dict[str, dict[str, Any]] = {
    "l2": {"norm": "l2"},
    "fgsm in l2": {"method": "fgsm", "norm": "l2"},
    "restarts": {"restarts": 2},
    "flipped": {"flip_signs": 0.3},
    "swa": {"averaging": "swa", "average_start": 0, "steps_per_epoch": 1},
    "ema": {"averaging": "ema"},
    "rates": {"layers": "fixed-lr", "layer_groups": "3,4", "rate_form": "gradient"}
    | {"fixed_lr": 0.02},
    "clipped": {"max_grad_norm": 0.1},
    "advlc by kl": {"regularizer": "advlc", "kind": "kl"},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_options_are_those_of_one_call(options: dict[str, Any]) -> None:
    # The published L2 step divides by |g| + 1e-10, g the gradient of the mean over a call.
    tolerance = 1e-7 if "norm" in options else 1e-12
    assert_as_one_call(lambda model: step_on(model, **options), tolerance=tolerance)


@pytest.mark.slow
def test_compiled_updates_are_those_of_one_call() -> None:
    assert_as_one_call(lambda model: step_on(model, mode="compiled"))


@pytest.mark.parametrize("method", ["pgd", "trades-te"])
def test_captured_updates_are_those_of_one_call(method: str) -> None:
    for sizes in (EVEN, UNEVEN):  # calls of one size overwrite each other's gradients
        assert_as_one_call(lambda model: capture(step_on(model, method)), sizes)


@pytest.mark.parametrize("regularizer", ["none", "consistency"])
def test_without_index_the_images_of_all_calls_are_numbered(regularizer: str) -> None:
    assert_as_one_call(lambda model: step_on(model, regularizer=regularizer), index=False)


@pytest.mark.parametrize("targeted", [False, True])
def test_what_belongs_to_an_image_goes_with_it(targeted: bool) -> None:
    """Soft labels, radii and masks of a call's images; without targets each image draws its own."""
    found = []
    for size in (16, 5):
        model = network()
        step = step_on(model)
        step.threat = Threat("linf", EPS, targeted=targeted)
        for number in range(UPDATES):
            x, y, *_ = tiny_batch(16, seed=number)
            generator = torch.Generator().manual_seed(number)
            eps = EPS * torch.rand(16, generator=generator, dtype=torch.float64)
            mask = torch.rand(x.shape, generator=generator) < 0.7
            soft = torch.rand(16, 4, generator=generator, dtype=torch.float64).softmax(1)
            y = y if targeted else soft
            for begin in range(0, 16, size):
                part = slice(begin, begin + size)
                step(x[part], y[part], eps=eps[part], mask=mask[part], update=part.stop >= 16)
        found.append(model.state_dict())
    for name, value in found[0].items():
        torch.testing.assert_close(found[1][name], value, rtol=0, atol=1e-12, msg=name)


def test_averages_and_schedules_follow_updates_not_calls() -> None:
    numbers: list[int] = []
    step = step_on(
        network(), averaging="swa", average_start=0, steps_per_epoch=1, before_update=numbers.append
    )
    for number in range(UPDATES):
        update(step, number, EVEN)
    assert numbers == list(range(UPDATES))
    assert int(step.state["average_count"]) == UPDATES
    assert step.calls == step.epoch == UPDATES


@pytest.mark.parametrize("set_to_none", [True, False])
def test_a_gradient_that_is_cleared_between_two_calls_is_refused(set_to_none: bool) -> None:
    x, y, index, _ = tiny_batch()
    step = step_on(network())
    step.optimizer.zero_grad(set_to_none=set_to_none)
    step(x, y, index, update=False)
    step.optimizer.zero_grad(set_to_none=set_to_none)
    with pytest.raises(UserError, match="zero_grad"):
        step(x, y, index)


def test_a_gradient_that_was_masked_between_two_calls_is_taken() -> None:
    x, y, index, _ = tiny_batch()
    model = network()
    step = step_on(model)
    step(x, y, index, update=False)
    for parameter in model.parameters():
        assert parameter.grad is not None
        parameter.grad[:1] = 0
    step(x, y, index)
    assert step.calls == 1


def test_a_state_without_the_gradient_that_waits_is_not_given_away() -> None:
    x, y, index, _ = tiny_batch()
    step, fresh = step_on(network()), step_on(network())
    step(x, y, index, update=False)
    with pytest.raises(UserError, match="save after a call that updates"):
        step.state_dict()
    fresh(x, y, index)
    # What was accumulated before a state was loaded is not part of the next update.
    step.load_state_dict(fresh.state_dict())
    step.model.load_state_dict(fresh.model.state_dict())
    step.optimizer.load_state_dict(copy.deepcopy(fresh.optimizer.state_dict()))
    step(x, y, index), fresh(x, y, index)
    for name, value in fresh.model.state_dict().items():
        assert torch.equal(step.model.state_dict()[name], value)


@pytest.mark.parametrize("captured", [False, True])
@pytest.mark.parametrize("bad", range(4))
def test_a_fault_in_any_call_masks_the_update_and_all_after_it(bad: int, captured: bool) -> None:
    model = network()
    step = step_on(model, averaging="ema")
    step = capture(step) if captured else step
    update(step, 0, (2, 2, 2, 2))
    before = {name: value.clone() for name, value in (model.state_dict() | step.state).items()}
    for number in (1, 2):
        x, y, index, _ = tiny_batch(8, seed=number)
        for call in range(4):
            part = slice(2 * call, 2 * call + 2)
            images = x[part].clone()
            if number == 1 and call == bad:
                images[0, 0, 0, 0] = torch.nan
            step(images, y[part], index[part], update=call == 3)
    for name, value in (model.state_dict() | step.state).items():
        assert torch.equal(value, before[name]), name
    with pytest.raises(TrainingError, match="not finite at step 1;"):
        step.check()


def test_a_scaled_gradient_that_overflows_in_one_call_skips_the_update() -> None:
    model = network().float()
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    step = step_on(model, scaler=scaler)
    update(step, 0, UNEVEN)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    x, y, index, _ = tiny_batch()
    x = x.float()
    overflowing = model.conv1.weight.register_hook(lambda gradient: gradient * torch.inf)
    step(x[:2], y[:2], index[:2], update=False)
    overflowing.remove()
    step(x[2:], y[2:], index[2:])
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert scaler.get_scale() == 2.0**9
    update(step, 1, UNEVEN)
    assert not torch.equal(model.state_dict()["conv1.weight"], before["conv1.weight"])
    step.check()


def test_a_loss_scale_changes_no_accumulated_update() -> None:
    found = []
    for scaler in (torch.amp.GradScaler("cpu", init_scale=2.0**10), None):
        model = network().float()
        step = step_on(model, scaler=scaler)
        for number in range(UPDATES):
            update(step, number, UNEVEN)
        found.append(model.state_dict())
    for name, value in found[1].items():
        torch.testing.assert_close(found[0][name], value)


def test_the_norm_of_a_gradient_that_waits_is_not_scaled() -> None:
    x, y, index, _ = tiny_batch()
    norms = []
    for scaler in (torch.amp.GradScaler("cpu", init_scale=2.0**10), None):
        step = step_on(network().float(), scaler=scaler)
        norms.append(step(x.float(), y, index, update=False)["grad_norm"])
    torch.testing.assert_close(*norms)


def test_state_per_sample_and_a_loss_scale_do_not_go_together() -> None:
    model = network().float()
    step = step_on(model, "atta-1", scaler=torch.amp.GradScaler("cpu"))
    with pytest.raises(UserError, match="use bf16 or float32"):
        update(step, 0, UNEVEN)
