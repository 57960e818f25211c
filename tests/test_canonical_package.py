"""The canonical AutoAttack as a reference: its verdicts and warnings, and nothing left behind."""

from __future__ import annotations

import importlib.util
import logging
import sys
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from test_attacks import images, small_net
from test_evaluation_masks import Around, same
from test_evaluation_masks import images as bright
from torch import Tensor, nn

import fastadv
from fastadv.errors import UserError
from fastadv.evaluation.counts import Counts, by_square
from fastadv.evaluation.reference import accuracies, canonical
from fastadv.evaluation.search.catalogue import SECOND_OPINION
from fastadv.run.beside import referenced
from fastadv.threat import Threat

THREAT = Threat("linf", 0.05)


def labelled(count: int = 20) -> tuple[Tensor, Tensor]:
    x, _ = images(count, torch.float32)
    y = small_net(torch.float32)(x).argmax(1)
    y[::5] = (y[::5] + 1) % 5
    return x, y


def test_the_verdicts_are_those_of_the_package_run_as_a_whole() -> None:
    pyautoattack = pytest.importorskip("pyautoattack")
    model, (x, y) = small_net(torch.float32), labelled()
    torch.manual_seed(7)
    expected_draw = torch.rand(1)
    torch.manual_seed(7)
    found = canonical(
        model,
        list(zip(x.split(8), y.split(8), strict=True)),
        "apgd-ce+apgd-t",
        threat=THREAT,
        seed=3,
    )
    assert torch.equal(torch.rand(1), expected_draw), "the global seed was moved"
    adversary = pyautoattack.AutoAttack(model, eps=0.05, seed=3)
    adversary.attacks_to_run = ["apgd-ce", "apgd-t"]
    adversary.apgd_targeted.n_target_classes = 4
    _, y_adv = adversary.run_standard_evaluation(x, y, batch_size=8)
    assert torch.equal(found.fooled_by < 0, y_adv == y)
    clean = model(x).argmax(1) == y
    assert torch.equal(found.fooled_by == 0, ~clean)
    assert found.stages == ("clean", "apgd-ce", "apgd-t")
    assert found.accuracies["clean"] == clean.double().mean().item() == 0.8
    robust = (y_adv == y).double().mean().item()
    assert found.accuracies["apgd-t"] == pytest.approx(robust)
    assert 0 < robust < 0.8


def test_the_trace_function_of_a_debugger_is_kept() -> None:
    pytest.importorskip("pyautoattack")
    model, (x, y) = small_net(torch.float32), labelled(2)

    def trace(frame: Any, event: str, argument: Any) -> None:
        return None

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        canonical(model, [(x, y)], "apgd-ce", threat=THREAT)
        assert sys.gettrace() is trace
    finally:
        sys.settrace(before)


def test_its_warnings_are_told_and_logged_nowhere_else(caplog: pytest.LogCaptureFixture) -> None:
    pytest.importorskip("pyautoattack")
    soft = Around(same, lambda z: z.softmax(1))
    with caplog.at_level(logging.WARNING):
        found = canonical(soft, [bright()], "apgd-ce", threat=Threat("linf", 0.02))
    assert any("probability distribution" in remark for remark in found.remarks)
    assert not caplog.records
    flat = Around(lambda x: (x * 255).round() / 255, same)
    found = canonical(flat, [bright(40)], "apgd-dlr", threat=Threat("linf", 0.02))
    (remark,) = found.remarks  # the batches' counts differ, the remark is one
    assert "zero gradient" in remark


def test_accuracies_after_each_stage() -> None:
    fooled_by = torch.tensor([-1, 0, 2, 2, 1, -1, -1, 0])
    assert accuracies(("clean", "a", "b"), fooled_by) == {"clean": 6 / 8, "a": 5 / 8, "b": 3 / 8}


REFUSED: dict[str, tuple[Callable[[], object], str]] = {
    "numbers": (lambda: referenced("clean,apgd-ce-50,pgd-20"), "none in 'clean,apgd-ce-50,pgd-20'"),
    "classes": (
        lambda: canonical(small_net(torch.float32, 3), [labelled()], threat=THREAT),
        "at least 4 classes and the model has 3",
    ),
    "box": (
        lambda: canonical(small_net(), [labelled()], threat=Threat("linf", 0.1, -1, 1)),
        r"images in \[0, 1\]",
    ),
    "mask": (
        lambda: canonical(
            small_net(), [labelled()], threat=Threat(mask=torch.ones(1, 1, 6, 6, dtype=torch.bool))
        ),
        "neither masks nor targets",
    ),
    "empty": (lambda: canonical(small_net(), [], threat=THREAT), "There are no images"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused_in_one_sentence(name: str) -> None:
    pytest.importorskip("pyautoattack")
    call, sentence = REFUSED[name]
    with pytest.raises(UserError, match=sentence):
        call()


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    real = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "pyautoattack" else real(name)
    )
    with pytest.raises(UserError, match=r"pip install 'fastadv\[eval\]'"):
        referenced("autoattack")


# The same warnings by our own attacks.


def told(call: Callable[[], object]) -> list[str]:
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        call()
    return [str(warning.message) for warning in seen]


def noisy(x: Tensor) -> Tensor:
    return x + 0.01 * torch.randn_like(x)


@pytest.mark.parametrize(
    ("model", "sentence"),
    [
        (Around(noisy, same), "change from call to call"),
        (Around(same, lambda z: z.softmax(1)), "returns probabilities"),
        (Around(lambda x: (x * 255).round() / 255, same), "gradient was exactly zero for 40 of 40"),
    ],
)
def test_our_attacks_give_them_too(model: nn.Module, sentence: str) -> None:
    x, y = bright()
    for call in (
        lambda: fastadv.evaluate(model, [(x, y)], ["apgd-dlr-3"], eps=0.02),
        lambda: fastadv.attack(model, x, y, "apgd-dlr-3", eps=0.02),
    ):
        assert any(sentence in remark for remark in told(call))
    honest = Around(same, same)
    assert told(lambda: fastadv.attack(honest, x, y, "apgd-dlr-3", eps=0.02)) == []


def test_a_square_attack_that_beats_the_gradients_is_reported() -> None:
    stages = ["clean", "apgd-ce", "square"]
    fooled_by = np.array([-1] * 90 + [0] * 4 + [1] * 5 + [2])
    assert by_square(stages, fooled_by) == 1
    assert by_square([*stages[:2], "square-300"], fooled_by) == 1
    assert by_square([*stages, "apgd-t"], fooled_by) == 0  # others came after it
    assert by_square([*stages, *SECOND_OPINION], fooled_by) == 1  # a search in bf16 has these
    assert by_square(["clean", "square"], np.array([1, 1])) == 0  # nothing to compare with
    (remark,) = Counts(["autoattack"], 100, [90], [0], [0], [1], [False, False]).remarks()
    assert "autoattack: Square, which sees no gradient, fooled the network on 1 of 100" in remark
    assert list(Counts(["autoattack"], 1000, [90], [0], [0], [2], [False, False]).remarks()) == []
    changes = [False, True]
    assert list(Counts(["autoattack-rand"], 100, [9], [0], [0], [0], changes).remarks()) == []
    two = Counts(["clean", "autoattack-rand"], 100, [50, 9], [0, 0], [0, 0], [0, 0], changes)
    assert list(two.remarks()) == []


def test_square_finds_what_misleading_gradients_hide() -> None:
    """A network whose gradient points the wrong way: APGD fails, Square does not."""

    class Misled(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: Any, *gradients: Tensor) -> Tensor:
            return -gradients[0]

    x, y = bright()
    model = Around(Misled.apply, same)
    call = lambda: fastadv.evaluate(model, [(x, y)], ["apgd-ce-5+square-300"], eps=0.11)  # noqa: E731
    assert any("Square, which sees no gradient" in remark for remark in told(call))
