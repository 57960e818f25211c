"""Captured steps of models with Python state: equal to eager ones, or not recorded."""

from __future__ import annotations

import enum
import functools
import random
import time
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from op_recorder import graphed
from tiny import sgd, tiny_step
from torch import Tensor, nn
from torch.nn import functional

import fastadv

STEPS = 6
Between = Callable[[Any, int], None]


class Net(nn.Module):
    """Two convolutions with BatchNorm, a dropout and an activation that can be changed."""

    temperature = 1.0

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 5, 3, padding=1), nn.BatchNorm2d(5)
        self.conv2, self.bn2 = nn.Conv2d(5, 5, 3, padding=1), nn.BatchNorm2d(5)
        self.act, self.drop, self.fc = nn.Softplus(), nn.Dropout(0.0), nn.Linear(5, 4)

    def features(self, x: Tensor) -> Tensor:
        x = self.act(self.bn1(self.conv1(x)))
        return self.drop(self.act(self.bn2(self.conv2(x))).mean((2, 3)))

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.features(x)) / self.temperature


def batch(number: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(number)
    x = torch.rand(6, 3, 8, 8, generator=generator).double()
    return x, torch.randint(0, 4, (6,), generator=generator), torch.arange(6) + 6 * (number % 3)


def trained(
    make: Callable[[], nn.Module],
    between: Between,
    *,
    captured: bool,
    method: str = "pgd",
    **options: Any,
) -> tuple[nn.Module, fastadv.Step, list[str]]:
    torch.manual_seed(0)
    random.seed(0)
    np.random.seed(0)
    model = make().double()
    options |= {} if method in ("apart", "atta-1", "free") else {"steps": 2}
    step = tiny_step(model, method, eps=0.1, optimizer=sgd(model), **options)
    if captured:
        step = graphed(step)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for number in range(STEPS):
            between(model, number)
            random.seed(number)
            np.random.seed(number)
            torch.manual_seed(number)
            step(*batch(number))
    step.check()
    return model, step, [str(each.message) for each in caught]


def compared(
    make: Callable[[], nn.Module],
    between: Between,
    reset: Callable[[], None] = lambda: None,
    **options: Any,
) -> tuple[int, list[str]]:
    """How often the captured step was recorded, and its warnings; it equals the eager one."""
    eager, *_ = trained(make, between, captured=False, **options)
    reset()
    model, step, told = trained(make, between, captured=True, **options)
    reset()
    for name, value in eager.state_dict().items():
        torch.testing.assert_close(model.state_dict()[name], value, rtol=1e-9, atol=1e-9, msg=name)
    plain = [
        {k: v for k, v in vars(m).items() if isinstance(v, (int, float))} for m in model.modules()
    ]
    assert plain == [
        {k: v for k, v in vars(m).items() if isinstance(v, (int, float))} for m in eager.modules()
    ]
    return step.internals.passes.recorded, told


def nothing(model: Any, number: int) -> None:
    pass


# -- what the user changes between two steps ------------------------------------------------------


class Kind(enum.Enum):
    PLAIN, DOUBLED = 1, 2


class Options:
    def __init__(self) -> None:
        self.inner = {"scale": [1.0, {"deep": 2.0}]}


class Holding(Net):
    """Numbers in containers, an enumeration, a name, an object, and a tensor that is no buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.scales, self.by_name, self.pair = [1.0, 1.0], {"a": 1.0}, (1.0, [1.0])
        self.kind, self.name, self.options = Kind.PLAIN, "plain", Options()
        self.weighting = torch.ones((), dtype=torch.float64)
        self.array = np.ones(1)

    def forward(self, x: Tensor) -> Tensor:
        out = super().forward(x) * self.scales[1] * self.by_name["a"] * self.pair[1][0]
        out = out * self.options.inner["scale"][1]["deep"] * self.weighting * float(self.array[0])
        out = out * 2 if self.kind is Kind.DOUBLED else out
        return out * 3 if self.name == "tripled" else out


def at_three(change: Callable[[Any], None]) -> Between:
    def between(model: Any, number: int) -> None:
        if number == 3:
            change(model)

    return between


def sets(name: str, value: Any) -> Between:
    def change(model: Any) -> None:
        *path, last = name.split(".")
        setattr(functools.reduce(getattr, path, model), last, value)

    return at_three(change)


CHANGES: dict[str, tuple[Callable[[], nn.Module], Between]] = {
    "attribute of the class": (Net, sets("temperature", 3.0)),
    "momentum": (Net, sets("bn1.momentum", 0.9)),
    "eps": (Net, sets("bn2.eps", 0.1)),
    "dropout to 1": (Net, sets("drop.p", 1.0)),
    "activation": (Net, sets("act", nn.GELU())),
    "activation's parameter": (Net, sets("act.beta", 3.0)),
    "eval of one BatchNorm": (Net, at_three(lambda m: m.bn1.eval())),
    "parameter replaced": (
        Net,
        at_three(lambda m: setattr(m.fc.bias, "data", m.fc.bias.data + 1)),
    ),
    "hook": (
        Net,
        at_three(lambda m: m.fc.register_forward_hook(lambda *a: a[2] * 2)),
    ),
    "list": (Holding, at_three(lambda m: m.scales.__setitem__(1, 3.0))),
    "dictionary": (Holding, at_three(lambda m: m.by_name.update(a=3.0))),
    "list in a tuple": (Holding, at_three(lambda m: m.pair[1].__setitem__(0, 3.0))),
    "enumeration": (Holding, sets("kind", Kind.DOUBLED)),
    "name": (Holding, sets("name", "tripled")),
    "object": (Holding, at_three(lambda m: m.options.inner["scale"][1].update(deep=5.0))),
    "tensor": (Holding, sets("weighting", torch.full((), 3.0, dtype=torch.float64))),
    "tensor in place": (Holding, at_three(lambda m: m.weighting.fill_(3.0))),
    "array": (Holding, at_three(lambda m: m.array.fill(3.0))),
}


@pytest.mark.filterwarnings("ignore:The attack moved no pixel")
@pytest.mark.parametrize("change", CHANGES)
def test_what_the_user_changes_is_recorded_again(change: str) -> None:
    make, between = CHANGES[change]
    recorded, told = compared(make, between)
    assert recorded == (1 if change == "tensor in place" else 2)
    assert not told


GLOBAL, LOOKED_UP = 1.0, {"scale": 1.0}


def helper(x: Tensor) -> Tensor:
    return x * GLOBAL * LOOKED_UP["scale"]


class ReadsGlobals(Net):
    factor = 1.0

    def forward(self, x: Tensor) -> Tensor:
        return helper(super().forward(x)) * type(self).factor


def set_global(value: float) -> None:
    globals()["GLOBAL"] = value


@pytest.mark.parametrize(
    ("change", "put_back"),
    [
        (lambda m: set_global(3.0), lambda: set_global(1.0)),
        (lambda m: LOOKED_UP.update(scale=3.0), lambda: LOOKED_UP.update(scale=1.0)),
        (
            lambda m: setattr(ReadsGlobals, "factor", 3.0),
            lambda: setattr(ReadsGlobals, "factor", 1.0),
        ),
    ],
    ids=["global", "global dictionary", "class"],
)
def test_globals_and_classes_are_recorded_again(change, put_back) -> None:
    assert compared(ReadsGlobals, at_three(change), put_back) == (2, [])


class Settings:
    scale = 1.0


class Slots:
    __slots__ = ("scale",)

    def __init__(self) -> None:
        self.scale = 1.0


class Various(Net):
    """Values that are read in unusual ways."""

    def __init__(self) -> None:
        super().__init__()
        self.slots, self.hidden = Slots(), [nn.Dropout(0.0)]

    def forward(self, x: Tensor, also: tuple[list[float], ...] = ([1.0],)) -> Tensor:
        out = self.hidden[0](super().forward(x))
        return out * Settings.scale * self.slots.scale * also[0][0]


def set_default(value: float) -> None:
    defaults: Any = Various.forward.__defaults__
    defaults[0][0][0] = value


@pytest.mark.parametrize(
    ("change", "put_back"),
    [
        (lambda m: setattr(Settings, "scale", 3.0), lambda: setattr(Settings, "scale", 1.0)),
        (lambda m: setattr(m.slots, "scale", 3.0), lambda: None),
        (lambda m: setattr(m.hidden[0], "p", 1.0), lambda: None),
        (lambda m: set_default(3.0), lambda: set_default(1.0)),
        (
            lambda m: setattr(Various, "features", lambda m, x: 2 * Net.features(m, x)),
            lambda: delattr(Various, "features"),
        ),
    ],
    ids=["settings", "slots", "hidden module", "default argument", "method of the class"],
)
@pytest.mark.filterwarnings("ignore:The attack moved no pixel")
def test_values_read_in_unusual_ways_are_recorded_again(change, put_back) -> None:
    recorded, told = compared(Various, at_three(change), put_back)
    assert recorded == 2
    assert not told


def test_closures_are_recorded_again() -> None:
    scale = 1.0

    class Closed(Net):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) * scale

    def between(model: Any, number: int) -> None:
        nonlocal scale
        scale = 1.0 if number < 3 else 3.0

    assert compared(Closed, between) == (2, [])


def test_values_that_alternate_are_recorded_once_each() -> None:
    def between(model: Any, number: int) -> None:
        model.temperature = 1.0 + number % 2

    assert compared(Net, between) == (2, [])


def test_a_value_that_keeps_changing_ends_the_recordings() -> None:
    def between(model: Any, number: int) -> None:
        model.temperature = 1.0 + number

    recorded, told = compared(Net, between)
    assert recorded == 5
    assert len(told) == 1
    assert "'temperature' keeps changing" in told[0]


def test_options_of_the_step_are_recorded_again() -> None:
    results = []
    for captured in (False, True):
        torch.manual_seed(0)
        model = Net().double()
        step = tiny_step(model, "pgd", steps=1, optimizer=sgd(model))
        step = graphed(step) if captured else step
        for number in range(STEPS):
            if number == 2:
                step.plan.adversary.steps = 3
            if number == 4:
                step.optimizer.param_groups[0].update(momentum=0.5, weight_decay=0.1, lr=0.2)
            step(*batch(number))
        results.append(model.state_dict())
    assert step.internals.passes.recorded == 2
    for name, value in results[0].items():
        torch.testing.assert_close(results[1][name], value, rtol=1e-9, atol=1e-9, msg=name)


def test_a_hook_on_all_modules_is_recorded_again() -> None:
    handles: list[Any] = []

    def hook(module: nn.Module, inputs: Any, output: Any) -> Any:
        return 2 * output if isinstance(module, nn.Dropout) else None

    def change(model: Any) -> None:
        handles.append(nn.modules.module.register_module_forward_hook(hook))

    recorded, told = compared(Net, at_three(change), lambda: handles.pop().remove())
    assert recorded == 2
    assert not told


def test_torchscript_is_not_recorded() -> None:
    def make() -> nn.Module:
        model = Net()
        model.act = torch.jit.script(nn.Tanh())
        return model

    recorded, told = compared(make, nothing)
    assert recorded == 0
    assert "TorchScript" in told[0]


@pytest.mark.parametrize("method", ["trades", "awp", "trades-te", "apart", "atta-1", "free"])
def test_methods(method: str) -> None:
    known = {"total_steps": STEPS, "steps_per_epoch": 3}
    more: dict[str, Any] = {"awp": {"warmup_epochs": 1}, "trades-te": {"te_start": 1, "te_end": 2}}
    if method == "free":
        more["free"] = {"replays": 2}
    options = known | more.get(method, {})
    options |= {"blocks": ("conv2",)} if method == "apart" else {}
    recorded, told = compared(Net, sets("temperature", 3.0), method=method, **options)
    assert recorded >= 2
    assert not told


# -- what a forward pass decides anew -------------------------------------------------------------


class Depth(Net):
    def forward(self, x: Tensor) -> Tensor:
        out = self.features(x)
        return self.fc(out * 2 if self.training and random.random() < 0.5 else out)


class NumpyDraw(Net):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * float(np.random.rand())


class OwnDraw(Net):
    def __init__(self) -> None:
        super().__init__()
        self.draw = random.Random(0)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * (2 if self.draw.random() < 0.5 else 1)


class NumpyGenerator(Net):
    def __init__(self) -> None:
        super().__init__()
        self.draw = np.random.default_rng(0)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * (2 if self.draw.random() < 0.5 else 1)


class Counter(Net):
    count = 0

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.count += 1
        return super().forward(x) * (1 + self.count // 5)


class CountsInList(Net):
    def __init__(self) -> None:
        super().__init__()
        self.counts = [0]

    def forward(self, x: Tensor) -> Tensor:
        self.counts[0] += 1
        return super().forward(x) * (1 + self.counts[0] // 5)


class Iterates(Net):
    def __init__(self) -> None:
        super().__init__()
        self.numbers = iter(range(1000))

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * (1 + next(self.numbers) // 5)


class Resize(Net):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(functional.interpolate(x, size=8 + random.randint(0, 3)))


class Item(Net):
    def forward(self, x: Tensor) -> Tensor:
        out = super().forward(x)
        return out * 2 if torch.rand(()).item() < 0.5 else out


class Branch(Net):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x if x.mean() > 0.5 else x * 2)


class Clock(Net):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + 1e-13 * time.perf_counter()


class CarriesTensor(Net):
    def __init__(self) -> None:
        super().__init__()
        self.mean = torch.zeros((), dtype=torch.float64)

    def forward(self, x: Tensor) -> Tensor:
        self.mean = 0.5 * self.mean + 0.5 * x.detach().mean()
        return super().forward(x - self.mean)


class HookCounts(Net):
    def __init__(self) -> None:
        super().__init__()
        calls = 0

        def hook(module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
            nonlocal calls
            calls += 1
            return output * (1 + calls // 5)

        self.fc.register_forward_hook(hook)


DECIDE = {
    Depth: "'random'",
    NumpyDraw: "'numpy.random'",
    OwnDraw: "generator of its own",
    NumpyGenerator: "generator of its own",
    Counter: "'count'",
    CountsInList: "'counts'",
    Iterates: "the iterator 'numbers'",
    Resize: "'random'",
    Item: "looks at the value of a tensor",
    Branch: "looks at the value of a tensor",
    Clock: "not the same in two calls",
    CarriesTensor: "'mean'",
    HookCounts: "calls",
}


@pytest.mark.parametrize("make", DECIDE)
def test_a_forward_that_python_decides_anew_is_not_recorded(make: type[Net]) -> None:
    recorded, told = compared(make, nothing)
    assert recorded == 0
    assert len(told) == 1
    assert DECIDE[make] in told[0]


def test_a_teacher_that_draws_random_numbers_is_not_recorded() -> None:
    def make() -> nn.Module:
        return Net()

    torch.manual_seed(5)
    teachers = [Net().double(), NumpyDraw().double()]
    options = {"target": "distillation", "teachers": teachers}
    recorded, told = compared(make, nothing, **options)
    assert recorded == 0
    assert "'numpy.random'" in told[0]


# -- what a model may do --------------------------------------------------------------------------


class Reassigns(Net):
    """A buffer that a forward pass reassigns, drawn masks, and features stored for a reader."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.mean = 0.5 * self.mean + 0.5 * x.detach().mean()
        self.left = self.features(x - self.mean)
        drawn = torch.rand(len(x), 1, dtype=x.dtype, device=x.device) + 0.5
        return self.fc(functional.dropout(self.left, 0.3, self.training) * drawn)


@pytest.mark.parametrize("method", ["pgd", "awp"])
def test_reassigned_buffers_torch_draws_and_stored_features_are_recorded(method: str) -> None:
    options = {"warmup_epochs": 0} if method == "awp" else {}
    known = {"total_steps": STEPS, "steps_per_epoch": 3}
    assert compared(Reassigns, nothing, method=method, **known, **options) == (1, [])
