"""A model or an optimizer that changes between two calls: the step uses its present state."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from every_recipe import call, step_of
from tiny import CLASSES, assert_same, sgd, tiny_batch, tiny_model, tiny_step, twin
from tiny_capture import capture
from tiny_staged import staged_model
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, prune

import fastadv
from fastadv.errors import UserError
from fastadv.training.training_step import Step

PLAIN = {"momentum": 0.0, "weight_decay": 0.0}


def make(model: nn.Module, method: str = "pgd", **options: Any) -> Step:
    options = {"steps": 2} | options if method not in ("apart", "fgsm") else options
    return tiny_step(model, method, optimizer=sgd(model, **PLAIN), **options)


def train(step: Step, updates: int, first: int = 0) -> None:
    for update in range(first, first + updates):
        x, y, index, start = tiny_batch(seed=update)
        dtype = next(step.model.parameters()).dtype
        step(x.to(dtype), y, index, start=start.to(dtype))


def add_to_optimizer(step: Step, module: nn.Module) -> None:
    step.optimizer.add_param_group({"params": list(module.parameters())})


def drawn(module: nn.Module, like: nn.Module) -> nn.Module:
    generator = torch.Generator().manual_seed(5)
    kind = next(like.parameters())
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.5)
    return module.to(kind.dtype)


PARTS = {
    "linear": lambda: nn.Linear(5, CLASSES),
    "bn1": lambda: nn.BatchNorm2d(5),
    "bn2": lambda: nn.BatchNorm2d(5),
    "conv1": lambda: nn.Conv2d(3, 5, 5, padding=2),
    "conv2": lambda: nn.Conv2d(5, 5, 1, bias=False),
}
METHODS = ["pgd", "pgd-eval", "trades", "awp", "rwp"]


def replaced_in(step: Step, name: str) -> nn.Module:
    new = drawn(PARTS[name](), step.model)
    setattr(step.model, name, new)
    add_to_optimizer(step, new)
    return new


def built_again(step: Step, method: str, **options: Any) -> Step:
    """A step of a copy of the model, with a new optimizer, in the state of ``step``."""
    other = make(twin(step.model), method, **options)
    other.load_state_dict(copy.deepcopy(step.state_dict()))
    return other


@pytest.mark.parametrize("amp", [False, True])
@pytest.mark.parametrize("name", PARTS)
@pytest.mark.parametrize("method", METHODS)
def test_a_replaced_part_learns_as_if_the_step_were_built_again(
    method: str, name: str, amp: bool
) -> None:
    model = tiny_model().float() if amp else tiny_model()
    step = make(model, method, amp=amp)
    train(step, 2)
    new = replaced_in(step, name)
    before = copy.deepcopy(new.state_dict())
    again = built_again(step, method, amp=amp)
    train(step, 2, 2)
    train(again, 2, 2)
    assert getattr(step.model, name) is new
    assert any(not torch.equal(p, before[key]) for key, p in new.named_parameters())
    assert_same(step.model, again.model, 1e-5 if amp else 1e-12)


SLOW = pytest.mark.slow


@pytest.mark.parametrize(
    ("mode", "name"),
    [
        ("compiled", "bn1"),
        pytest.param("compiled", "linear", marks=SLOW),
        pytest.param("compiled", "conv2", marks=SLOW),
        *(("captured", name) for name in ("linear", "bn1", "conv2")),
    ],
)
def test_a_replaced_part_learns_compiled_and_captured(mode: str, name: str) -> None:
    def make_step(model: nn.Module) -> Step:
        if mode == "compiled":
            return make(model, "pgd-eval", mode=mode)
        return capture(make(model, "pgd-eval"))

    step = make_step(tiny_model())
    train(step, 2)
    replaced_in(step, name)
    again = built_again(step, "pgd-eval")
    train(step, 2, 2)
    train(again, 2, 2)
    assert_same(step.model, again.model, 1e-10)


def test_a_convolution_with_a_hook_is_followed() -> None:
    """APART's noise enters the new block."""
    options = {"total_steps": 8, "pad": 0}
    step = make(tiny_model(), "apart", **options)
    train(step, 2)
    step.state["step_sizes"][2:] = 0.3
    replaced_in(step, "conv2")
    again = built_again(step, "apart", **options)
    train(step, 1, 2)
    train(again, 1, 2)
    assert_same(step.model, again.model, 1e-12)
    assert torch.equal(step.state["step_sizes"], again.state["step_sizes"])


def test_changed_residual_blocks_are_refused() -> None:
    model = staged_model()
    step = step_of("apart", model)
    call(step, 0)
    model.layer2 = nn.Identity()
    with pytest.raises(UserError, match="build the step again"):
        call(step, 1)


def test_a_part_in_no_parameter_group_is_refused_until_it_is_added() -> None:
    step = make(tiny_model())
    train(step, 1)
    new = step.model.linear = drawn(nn.Linear(5, CLASSES), step.model)
    before = copy.deepcopy(step.model.state_dict())
    for _ in range(2):
        with pytest.raises(UserError, match=r"linear\.weight learns.*add_param_group"):
            train(step, 1)
    for name, tensor in step.model.state_dict().items():
        assert torch.equal(tensor, before[name])
    with step.evaluation_weights():  # is none of training
        pass
    add_to_optimizer(step, new)
    train(step, 1)
    assert not torch.equal(new.weight, before["linear.weight"])


def test_a_frozen_part_needs_no_group() -> None:
    step = make(tiny_model())
    step.model.linear = drawn(nn.Linear(5, CLASSES), step.model).requires_grad_(False)
    train(step, 1)


def test_reassigned_weights_are_refused() -> None:
    step = make(tiny_model())
    train(step, 1)
    step.model.load_state_dict(tiny_model(7).state_dict(), assign=True)
    with pytest.raises(UserError, match="build the optimizer and the step again"):
        train(step, 1)


def test_unfrozen_parameters_must_be_in_a_group() -> None:
    model = tiny_model()
    model.conv1.requires_grad_(False)
    learning = [p for p in model.parameters() if p.requires_grad]
    step = tiny_step(model, steps=1, optimizer=torch.optim.SGD(learning, 0.1))
    train(step, 1)
    model.conv1.requires_grad_(True)
    with pytest.raises(UserError, match=r"conv1\.weight learns"):
        train(step, 1)


def test_parameters_that_were_never_in_a_group_stay_out() -> None:
    model = tiny_model()
    before = copy.deepcopy(model.state_dict())
    step = tiny_step(model, steps=1, optimizer=torch.optim.SGD(model.linear.parameters(), 0.1))
    train(step, 2)
    model.bn2 = drawn(nn.BatchNorm2d(5), model)  # a name that was kept out
    train(step, 1)
    assert torch.equal(model.conv1.weight, before["conv1.weight"])
    assert not torch.equal(model.linear.weight, before["linear.weight"])


def test_a_removed_group_is_reported() -> None:
    model = tiny_model()
    groups = [{"params": list(module.parameters())} for module in model.children()]
    step = tiny_step(model, steps=1, optimizer=torch.optim.SGD(groups, 0.1))
    train(step, 1)
    del step.optimizer.param_groups[-1]
    with pytest.raises(UserError, match=r"linear\.weight learns"):
        train(step, 1)


def test_a_change_of_type_is_reported() -> None:
    step = make(tiny_model().float())
    train(step, 1)
    step.model.double()
    with pytest.raises(UserError, match="float32 when the step began and is float64 now"):
        train(step, 1)


def test_pruning_between_two_calls_masks_the_weight_from_then_on() -> None:
    """The parameter is the same under another name; its twin is masked by hand."""
    model, other = tiny_model(), tiny_model()
    steps = [make(model, "pgd-eval"), make(other, "pgd-eval")]
    for step in steps:
        train(step, 1)
    prune.l1_unstructured(model.linear, "weight", 0.5)
    mask = model.linear.weight_mask
    with torch.no_grad():
        other.linear.weight *= mask
    other.linear.weight.register_hook(lambda gradient: gradient * mask)
    for step in steps:
        train(step, 2, 1)
    model(tiny_batch()[0])
    torch.testing.assert_close(model.linear.weight, other.linear.weight, rtol=0, atol=1e-12)
    assert_same(model.conv1, other.conv1, 1e-12)


class Doubled(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return 2 * weight


def test_a_parametrization_of_the_same_parameter_is_followed() -> None:
    """It continues to learn and to be averaged under its new name; its twin doubles by hand."""
    step = make(tiny_model(), averaging="ema", average_decay=0.9)
    train(step, 3)
    parametrize.register_parametrization(step.model.linear, "weight", Doubled())
    again = make(tiny_model(), averaging="ema", average_decay=0.9)
    train(again, 3)
    optimizer = again.optimizer
    again.model.linear = Doubling(again.model.linear)
    for each in (step, again):
        train(each, 2, 3)
    assert optimizer is again.optimizer
    name = "linear.parametrizations.weight.original"
    own, expected = averages(step), averages(again)
    torch.testing.assert_close(own[name], expected["linear.inner.weight"], rtol=0, atol=1e-12)
    assert_same(step.model.conv1, again.model.conv1, 1e-12)


class Doubling(nn.Module):
    """The layer with twice its weight."""

    def __init__(self, inner: nn.Linear) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, 2 * self.inner.weight, self.inner.bias)


def test_a_parametrization_with_new_parameters_is_refused() -> None:
    step = make(tiny_model())
    train(step, 1)
    parametrizations.weight_norm(step.model.conv1, "weight")
    with pytest.raises(UserError, match=r"conv1\.parametrizations\.weight\.original"):
        train(step, 1)


def test_a_new_head_with_another_number_of_classes() -> None:
    step = make(tiny_model())
    train(step, 1)
    new = step.model.linear = drawn(nn.Linear(5, 7), step.model)
    add_to_optimizer(step, new)
    x, _, index, start = tiny_batch()
    step(x, torch.arange(8) % 7, index, start=start)
    step = make(tiny_model(), "te", total_steps=8, steps_per_epoch=2)
    train(step, 1)
    new = step.model.linear = drawn(nn.Linear(5, 7), step.model)
    add_to_optimizer(step, new)
    for _ in range(2):
        with pytest.raises(UserError, match="returns 7 logits and returned 4"):
            train(step, 1)


def test_awp_follows_the_groups_it_chose() -> None:
    model = staged_model()
    step = step_of("awp", model, groups=("4",), warmup_epochs=0)
    call(step, 0)
    conv = model.layer4[0].conv2
    model.layer4[0].conv2 = new = copy.deepcopy(conv)
    add_to_optimizer(step, new)
    call(step, 1)
    assert {id(p) for p in step.internals.update.parameters.perturbed().values()} == {
        id(p) for name, p in model.named_parameters() if "layer4" in name and p.ndim > 1
    }


def test_rates_of_layers_stay_what_they_were() -> None:
    """RAT-LR by gradients: a group added later does not change the rates of the others."""
    model = staged_model()
    step = step_of("rat-lr", model, rate_form="gradient")
    optimizer = step.optimizer
    call(step, 0)
    for group in optimizer.param_groups:
        group["lr"] /= 10
    model.linear = new = copy.deepcopy(model.linear)
    add_to_optimizer(step, new)
    call(step, 1)
    assert step.plan.layers.rates[0] == pytest.approx(10 * optimizer.param_groups[0]["lr"])
    assert len(step.plan.layers.rates) == len(optimizer.param_groups)


# -- averages -------------------------------------------------------------------------------------


def averaging(kind: str) -> dict[str, Any]:
    if kind == "ema":
        return {"averaging": "ema", "average_decay": 0.05}
    return {"averaging": "swa", "average_start": 0, "steps_per_epoch": 1}


def averages(step: Step) -> dict[str, Tensor]:
    with step.evaluation_weights():
        return {name: p.detach().clone() for name, p in step.model.named_parameters()}


class Reference:
    """The averages written out: a dictionary by name, over every parameter."""

    def __init__(self, kind: str, model: nn.Module) -> None:
        self.kind, self.count = kind, 0
        self.average = {name: p.detach().clone() for name, p in model.named_parameters()}

    def take(self, model: nn.Module) -> None:
        self.count += 1
        for name, parameter in model.named_parameters():
            old = self.average[name]
            decay = min(0.05, self.count / (9 + self.count))
            share = 1 - decay if self.kind == "ema" else 1 / self.count
            self.average[name] = old + share * (parameter.detach() - old)


class Twins(nn.Module):
    """Two layers of one shape each, of which one is frozen."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 3, 3, padding=1)
        self.second = nn.Conv2d(3, 3, 3, padding=1)
        self.linear = nn.Linear(3, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(self.second(torch.tanh(self.first(x))).mean((2, 3)))


@pytest.mark.parametrize("kind", ["ema", "swa"])
@pytest.mark.parametrize("saved", [False, True])
def test_freezing_and_unfreezing_layers_of_one_shape(kind: str, saved: bool) -> None:
    torch.manual_seed(0)
    model = Twins().double()
    step = make(model, "fgsm", total_steps=12, **averaging(kind))
    expected = Reference(kind, model)
    plan = [(True, False), (False, True), (True, True), (False, False), (True, False)]
    for update, (first, second) in enumerate(plan * 2):
        model.first.requires_grad_(first)
        model.second.requires_grad_(second)
        train(step, 1, update)
        expected.take(model)
        if saved and update == 5:
            other = copy.deepcopy(model)
            other.second.requires_grad_(True)
            again = make(other, "fgsm", total_steps=12, **averaging(kind))
            again.load_state_dict(copy.deepcopy(step.state_dict()))
            model, step = other, again
        found = averages(step)
        assert found.keys() == expected.average.keys()
        for name, tensor in found.items():
            torch.testing.assert_close(tensor, expected.average[name], rtol=0, atol=1e-12)


@pytest.mark.parametrize("kind", ["ema", "swa"])
def test_a_new_head_of_the_same_shape_has_an_average_of_its_own(kind: str) -> None:
    step = make(tiny_model(), "fgsm", total_steps=12, **averaging(kind))
    train(step, 3)
    old = averages(step)
    new = replaced_in(step, "linear")
    first = new.weight.detach().clone()
    assert torch.equal(averages(step)["linear.weight"], first)  # before any call
    assert torch.equal(averages(step)["conv1.weight"], old["conv1.weight"])
    mean = first
    for taken, update in enumerate(range(3, 6), 1):
        train(step, 1, update)
        decay = min(0.05, (1 + update) / (10 + update))
        share = 1 - decay if kind == "ema" else 1 / taken
        mean = mean + share * (new.weight.detach() - mean)
        torch.testing.assert_close(averages(step)["linear.weight"], mean, rtol=0, atol=1e-12)
    resumed = make(twin(step.model), "fgsm", total_steps=12, **averaging(kind))
    resumed.load_state_dict(copy.deepcopy(step.state_dict()))
    for each in (step, resumed):
        train(each, 1, 6)
    for name, tensor in averages(resumed).items():
        torch.testing.assert_close(tensor, averages(step)[name], rtol=0, atol=1e-12)


def test_modules_that_swap_places_keep_their_averages() -> None:
    torch.manual_seed(0)
    model = Twins().double()
    step = make(model, "fgsm", averaging="ema", average_decay=0.9)
    train(step, 3)
    before = averages(step)
    model.first, model.second = model.second, model.first
    after = averages(step)
    assert torch.equal(after["first.weight"], before["second.weight"])
    assert torch.equal(after["second.weight"], before["first.weight"])


def test_the_averages_of_another_model_are_refused() -> None:
    step = make(tiny_model(), averaging="ema")
    train(step, 1)
    saved = copy.deepcopy(step.state_dict())
    saved["parts"]["averaging"].pop("average.linear.weight")
    with pytest.raises(UserError, match=r"'linear\.weight' is not in the saved state"):
        make(tiny_model(), averaging="ema").load_state_dict(saved)


def test_through_the_public_interface() -> None:
    torch.manual_seed(0)
    model = fastadv.build_model("preact_resnet18", num_classes=4, width=4)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    step = fastadv.step(model, optimizer, "fgsm", averaging="ema")
    x, y = torch.rand(4, 3, 8, 8), torch.arange(4)
    step(x, y)
    name = next(name for name, m in model.named_modules() if isinstance(m, nn.Linear))
    old = model.get_submodule(name)
    new = nn.Linear(old.in_features, 4)
    setattr(model, name, new)
    optimizer.add_param_group({"params": new.parameters()})
    before = new.weight.detach().clone()
    step(x, y)
    assert model.get_submodule(name) is new
    assert not torch.equal(new.weight, before)
