"""Models that return a tuple, a dictionary or an object: ``output=`` says where the logits are."""

from __future__ import annotations

import copy
from collections import OrderedDict, namedtuple
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from odd_readers import CLASSES, Net, made
from tiny import EPS, assert_same, climb, descend, sgd, tiny_batch, tiny_step
from tiny_capture import capture
from torch import Tensor, nn
from torch.nn import functional

import fastadv
from fastadv.engine.model.outputs import logits_in

Found = namedtuple("Found", "features logits")


@dataclass
class Record:
    scores: Tensor
    features: Tensor


@dataclass
class WithLogits:
    logits: Tensor
    loss: Tensor | None = None


class ModelOutput(OrderedDict):
    """As in transformers: a dictionary whose entries are attributes and positions, too."""

    def __getattr__(self, name: str) -> Any:
        return self[name]


KINDS: dict[str, tuple[Callable[[Tensor, Tensor], Any], Any]] = {
    "a tuple's first": (lambda z, h: (z, h), 0),
    "a list's last": (lambda z, h: [h, z], -1),
    "a tuple inside a tuple": (lambda z, h: (h, (h, z)), lambda found: found[1][1]),
    "a dictionary's logits": (lambda z, h: {"logits": z, "features": h}, None),
    "a dictionary's scores": (lambda z, h: {"scores": z, "features": h}, "scores"),
    "a field of a dataclass": (Record, "scores"),
    "the logits of a dataclass": (lambda z, h: WithLogits(z), None),
    "the logits of a named tuple": (lambda z, h: Found(h, z), None),
    "the logits of a model of transformers": (lambda z, h: ModelOutput(logits=z, hidden=h), None),
    "its first entry": (lambda z, h: ModelOutput(logits=z, hidden=h), 0),
    "a tensor beside a name": (lambda z, h: z, "logits"),
}


class Wrapped(Net):
    """``Net`` whose logits and features are put together by ``wrap``."""

    wrap: Callable[[Tensor, Tensor], Any]

    def forward(self, x: Tensor) -> Any:
        features = self.second(self.first(x))
        return self.wrap(self.head(features), features)


def wrapped(kind: str) -> Wrapped:
    model = made(Wrapped)
    model.wrap = KINDS[kind][0]
    return model


def batch(count: int = 6) -> tuple[Tensor, Tensor, Tensor]:
    x, y, _, start = tiny_batch(count)
    return x, y, start


def by_hand(attack_bn: str = "train") -> nn.Module:
    """Three updates of PGD-3 on the plain network, from a given start."""
    model = made(Net)
    optimizer = sgd(model)
    x, y, start = batch()
    for _ in range(3):
        x_adv = climb(
            model, x, start, lambda z: functional.cross_entropy(z, y), EPS / 4, 3, attack_bn
        )
        descend(optimizer, functional.cross_entropy(model(x_adv), y))
    return model


def trained(model: nn.Module, **options: Any) -> nn.Module:
    x, y, start = batch()
    step = tiny_step(model, "pgd", steps=3, alpha=EPS / 4, **options)
    for _ in range(3):
        step(x, y, start=start)
    step.check()
    return model


@pytest.mark.parametrize("attack_bn", ["train", "eval"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_model_trains_as_if_it_returned_its_logits(kind: str, attack_bn: str) -> None:
    model = trained(wrapped(kind), output=KINDS[kind][1], attack_bn=attack_bn)
    assert_same(model, by_hand(attack_bn))


@pytest.mark.parametrize("kind", KINDS)
def test_compiled(kind: str) -> None:
    model = trained(wrapped(kind), output=KINDS[kind][1], mode="compiled")
    assert_same(model, by_hand())


@pytest.mark.parametrize("method", ["trades", "awp", "fgsm-n", "pgd-gradalign", "apart"])
@pytest.mark.parametrize("kind", ["a tuple's first", "a field of a dataclass"])
def test_every_pass_of_a_method_takes_the_logits(method: str, kind: str) -> None:
    def result(model: nn.Module, **options: Any) -> nn.Module:
        x, y, start = batch()
        settings: dict[str, Any] = {"total_steps": 8, "steps_per_epoch": 4}
        settings |= {"blocks": ["c2"]} if method == "apart" else {}
        step = tiny_step(model, method, **settings, **options)
        for number in range(2):
            step(x, y, torch.arange(6), start=start if number else None)
        return model

    model = result(wrapped(kind), output=KINDS[kind][1])
    assert_same(model, result(made(Net)), 0)


@pytest.mark.parametrize("kind", ["a tuple's first", "the logits of a dataclass"])
def test_captured(kind: str) -> None:
    model = wrapped(kind)
    step = capture(tiny_step(model, "pgd", steps=3, alpha=EPS / 4, output=KINDS[kind][1]))
    x, y, start = batch()
    for _ in range(3):
        step(x, y, start=start)
    assert step.internals.passes.recorded == 1
    assert_same(model, by_hand())


def test_what_a_function_reads_is_recorded_again() -> None:
    sizes = {"temperature": 1.0}

    def logits(found: Any) -> Tensor:
        return found[0] / sizes["temperature"]

    models = [wrapped("a tuple's first") for _ in range(2)]
    captured, eager = (tiny_step(model, "fgsm", output=logits) for model in models)
    capture(captured)
    x, y, _ = batch()
    for temperature in (1.0, 2.0):
        sizes["temperature"] = temperature
        for step in (captured, eager):
            step(x, y)
    assert captured.internals.passes.recorded == 2
    assert_same(*models)


class Leaky(Net):
    """Returns the output of a convolution, too, which a fold would change."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        h = self.c1(x)
        return self.head(self.second(torch.tanh(self.b1(h)))), h


class Plain(Leaky):
    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        logits, h = super().forward(x)
        return logits + h.mean((1, 2, 3))[:, None] * torch.arange(CLASSES)


def test_a_function_may_read_the_output_of_a_convolution() -> None:
    model, expected = made(Leaky), made(Plain)

    def logits(found: tuple[Tensor, Tensor]) -> Tensor:
        return found[0] + found[1].mean((1, 2, 3))[:, None] * torch.arange(CLASSES)

    x, y, start = batch()
    for each, output in ((model, logits), (expected, None)):
        step = tiny_step(each, "pgd", steps=3, attack_bn="eval", output=output)
        for _ in range(2):
            step(x, y, start=start)
    assert_same(model, expected)


def test_the_logits_of_teachers_are_at_the_same_place() -> None:
    def result(student: nn.Module, teachers: list[nn.Module], output: Any) -> nn.Module:
        torch.manual_seed(1)
        for teacher in teachers:
            with torch.no_grad():
                for parameter in teacher.parameters():
                    parameter.add_(torch.randn_like(parameter))
        x, y, start = batch()
        options = {"target": "distillation", "teachers": teachers, "output": output}
        step = tiny_step(student, "pgd", steps=2, **options)
        step(x, y, start=start)
        return student

    kind = "a dictionary's scores"
    found = result(wrapped(kind), [wrapped(kind), made(Net)], "scores")
    assert_same(found, result(made(Net), [made(Net), made(Net)], None), 0)
    with pytest.raises(fastadv.UserError, match=r"A teacher must return logits \(6,classes\)"):
        result(wrapped("a tuple's first"), [made(Net), made(Net)], lambda found: found[0])


@pytest.mark.parametrize(
    ("kind", "output", "sentence"),
    [
        ("a tuple's first", None, "not a tuple; say where in it they are: output=0, output='name'"),
        ("a list's last", None, "not a list; say where"),
        ("a dictionary's scores", None, "not a dict; say where"),
        ("a field of a dataclass", None, "not a Record; say where"),
        ("a tuple's first", 2, "output=2 is outside of the 2 entries"),
        ("a tuple's first", "logits", "output='logits' is a name, and the model returns a tuple"),
        ("a dictionary's scores", "score", "Unknown output 'score'; did you mean 'scores'"),
        ("a field of a dataclass", "score", "Unknown output 'score'; did you mean 'scores'"),
        ("a field of a dataclass", 0, "output=0 is a position, and the model returns a Record"),
        ("a tuple inside a tuple", 1, "output=1 finds a tuple in the tuple that the model returns"),
        ("a tuple's first", True, "output says where the logits are"),
        ("a tuple's first", 1.5, "output says where the logits are"),
        ("a tuple's first", list, "output says where the logits are"),
    ],
)
def test_a_place_without_logits_is_refused(kind: str, output: Any, sentence: str) -> None:
    model = wrapped(kind)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(fastadv.UserError, match=sentence) as raised:
        trained(model, output=output)
    assert "\n" not in str(raised.value)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_a_tensor_is_never_indexed() -> None:
    z = torch.arange(6.0).view(2, 3)
    for output in (None, 0, "logits"):
        assert logits_in(z, output) is z
    assert torch.equal(logits_in(z, lambda found: found[:, :2]), z[:, :2])
