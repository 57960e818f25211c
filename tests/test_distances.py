"""Methods that hold predictions at two points together: against formulas, and their refusals."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import distance_formulas as formulas
import pytest
import torch
from test_cost import counted_in_an_update
from tiny import EPS, assert_same, tiny_batch, tiny_model, tiny_step
from tiny_capture import capture

from fastadv.algorithms.adversaries import liet
from fastadv.algorithms.contract import Batch, Context, required
from fastadv.algorithms.resolution import resolve
from fastadv.algorithms.targets import random_smoothing
from fastadv.errors import UserError
from fastadv.run.request import RunRequest
from fastadv.run.resolve import resolve_run
from fastadv.threat import Threat
from fastadv.training.training_step import Step


def batches(count: int) -> formulas.Batches:
    return [tiny_batch(seed=update)[:3] for update in range(count)]


def trained(method: str, data: formulas.Batches, **options: Any) -> Step:
    step = tiny_step(tiny_model(), method, **options)
    for x, y, index in data:
        step(x, y, index)
    assert step.healthy()
    return step


def test_mart() -> None:
    model, data = tiny_model(), batches(3)
    step = trained("mart", data, steps=3, alpha=0.04, beta=2.0)
    formulas.mart(model, data, eps=EPS, beta=2.0, steps=3, alpha=0.04)
    assert_same(step.model, model)


def test_what_mart_refuses() -> None:
    with pytest.raises(UserError, match="identically 0"):
        resolve("mart", {"adversary": "none", "start": "none"})


def test_mart_makes_the_passes_that_are_counted() -> None:
    seen, expected = counted_in_an_update("mart", weights="awp")
    assert seen == expected


LIET_STREAMS = {
    "noise": liet.NOISE,
    "mask": liet.MASK,
    "ratio": liet.RATIO,
    "side": liet.SIDE,
    "outer": random_smoothing.OUTER,
    "attack": random_smoothing.ATTACK,
}


@pytest.mark.parametrize("eps", [0.03, 0.1])
def test_liet(eps: float) -> None:
    """Two epochs of five updates; the label information is renewed after every third."""
    model, data = tiny_model(), batches(10)
    options = {"reg_weight": 7.0, "renew_every": 3, "total_steps": 10, "steps_per_epoch": 5}
    step = trained("liet", data, eps=eps, **options)
    wide = eps > 8 / 255
    seen = formulas.liet(model, data, LIET_STREAMS, eps, 7.0, 5, 3, wide)
    assert_same(step.model, model)
    kept = [torch.equal(one, other) for one, other in pairwise(seen)]
    assert kept == [True, True, False, True, False, True, True, False, True]
    assert torch.equal(step.state["label_information"], seen[-1] / eps)


def test_liet_draws_other_labels_for_the_attack() -> None:
    step = tiny_step(tiny_model(), "liet", total_steps=2, steps_per_epoch=1)
    x, y, index, _ = tiny_batch()
    step(x, y, index)
    batch = Batch(x, y, index, torch.zeros((), dtype=torch.int64), step.threat)
    found = step.plan.target.prepare_batch(batch, Context())
    labels = [required(found.soft_targets), required(found.attack_targets)]
    for label in labels:
        torch.testing.assert_close(label.sum(1), torch.ones(len(y)).double())
        right = label.gather(1, y[:, None])
        torch.testing.assert_close(right, torch.full_like(right, 0.4))
    assert not torch.equal(*labels)


@pytest.mark.parametrize("captured", [False, True])
def test_the_label_information_stays_after_an_update_that_does_not_count(captured: bool) -> None:
    options = {"renew_every": 1, "total_steps": 4, "steps_per_epoch": 4}
    step = tiny_step(tiny_model(), "liet", **options)
    step = capture(step) if captured else step
    x, y, index, _ = tiny_batch()
    step(x, y, index)
    with torch.no_grad():
        step.model.linear.bias[0] = float("nan")
    step(x, y, index)
    assert not step.healthy()
    before = step.state["label_information"].clone()
    with torch.no_grad():
        step.model.linear.bias[0] = 3.0
    step(x, y, index)
    assert torch.equal(step.state["label_information"], before)


def test_a_given_start_replaces_the_label_information() -> None:
    x, y, index, start = tiny_batch()
    step = tiny_step(tiny_model(), "liet", eps=0.03, total_steps=2, steps_per_epoch=1)
    step(x, y, index, start=start)
    made = step.plan.adversary.joint_center(
        Batch(x, y, index, torch.zeros((), dtype=torch.int64), step.threat, start=start)
    )
    torch.testing.assert_close(made, formulas.boxed(x + start, x, 0.03))


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"norm": "l2"}, "take norm='linf'"),
        ({"threat": Threat("linf", 0.1, targeted=True)}, "cannot aim at another"),
        ({"min_mask": 0.6}, "min_mask must be at most max_mask"),
        ({"start": "uniform"}, "begins where its own definition says"),
        ({"target": "temporal-ensembling"}, "keeps a row per sample"),
    ],
)
def test_what_liet_refuses(options: dict[str, Any], reason: str) -> None:
    with pytest.raises(UserError, match=reason):
        tiny_step(tiny_model(), "liet", total_steps=2, steps_per_epoch=1, **options)


def test_liet_refuses_images_of_another_size() -> None:
    step = tiny_step(tiny_model(), "liet", total_steps=2, steps_per_epoch=1)
    x, y, index, _ = tiny_batch()
    step(x, y, index)
    with pytest.raises(UserError, match="an image per class of size 3x6x6"):
        step(x[..., :5], y, index)


@pytest.mark.parametrize("options", [{}, {"shrink": 0.5}, {"attack_bn": "eval"}])
def test_liet_makes_the_passes_that_are_counted(options: dict[str, Any]) -> None:
    seen, expected = counted_in_an_update("liet", **options)
    assert seen == expected


def test_ikl() -> None:
    """Three epochs of two updates; not every epoch shows every class."""
    model, data = tiny_model(), batches(6)
    data[2:4] = [(x, y.clamp(max=2), index) for x, y, index in data[2:4]]
    options = {"weights": "none", "averaging": "none", "steps": 2, "alpha": 0.04}
    options |= {"ce_weight": 3.0, "mse_weight": 7.0, "class_temperature": 2.0}
    step = trained("ikl", data, total_steps=6, steps_per_epoch=2, **options)
    weights, sums = formulas.ikl(model, data, eps=0.1, steps=2, alpha=0.04, per_epoch=2)
    assert_same(step.model, model)
    torch.testing.assert_close(step.state["class_weights"], weights[-1], rtol=1e-12, atol=0)
    torch.testing.assert_close(step.state["class_sums"], sums, rtol=1e-12, atol=1e-15)
    assert torch.equal(weights[1][3], weights[2][3]), "class 3 is missing in the second epoch"
    assert not torch.equal(weights[1][:3], weights[2][:3])


@pytest.mark.parametrize("captured", [False, True])
def test_the_sums_of_ikl_stay_after_an_update_that_does_not_count(captured: bool) -> None:
    options = {"averaging": "none", "total_steps": 6, "steps_per_epoch": 2}
    step = tiny_step(tiny_model(), "ikl", **options)
    step = capture(step) if captured else step
    x, y, index, _ = tiny_batch()
    step(x, y, index)
    before = {name: tensor.clone() for name, tensor in step.state.items()}
    assert before["class_sums"].any()
    with torch.no_grad():
        step.model.linear.bias[0] = float("nan")
    for _ in range(3):  # the epoch ends meanwhile
        step(x, y, index)
    assert not step.healthy()
    for name in ("class_weights", "class_sums"):
        assert torch.equal(step.state[name], before[name]), name


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"adversary": "none"}, "the same without an attack"),
        ({"start": "center"}, "has no gradient"),
    ],
)
def test_what_ikl_refuses(options: dict[str, Any], reason: str) -> None:
    with pytest.raises(UserError, match=reason):
        tiny_step(tiny_model(), "ikl", total_steps=2, steps_per_epoch=1, **options)


@pytest.mark.parametrize("options", [{}, {"weights": "none"}])
def test_ikl_makes_the_passes_that_are_counted(options: dict[str, Any]) -> None:
    seen, expected = counted_in_an_update("ikl", **options)
    assert seen == expected


def test_the_rise_of_eps_in_ikl_ends_with_the_run() -> None:
    whole = resolve_run(RunRequest(method="ikl", data="cifar10"))
    assert (whole.epochs, whole.eps_warmup) == (200, 200)
    assert whole.plan.options["alpha"].at(100) == pytest.approx(2 / 255)
    assert resolve_run(RunRequest(method="ikl", data="cifar10", epochs=50)).eps_warmup == 50
    said = RunRequest(method="ikl", data="cifar10", epochs=50, eps_warmup=3.0)
    assert resolve_run(said).eps_warmup == 3


def test_hat() -> None:
    model, helper, data = tiny_model(), tiny_model(9).eval(), batches(3)
    options = {"steps": 2, "alpha": 0.04, "reg_weight": 0.7, "helper_scale": 3.0}
    step = trained("hat", data, helper=helper, **options)
    formulas.hat(model, tiny_model(9).eval(), data, eps=0.1, steps=2, alpha=0.04)
    assert_same(step.model, model)
    assert_same(helper, tiny_model(9), tolerance=0)


PLAIN = {"objective": "ce", "bn_passes": ("adversarial",)}


def test_hat_depends_on_its_helper_and_says_when_it_is_missing() -> None:
    plans = [resolve("hat", {"helper": tiny_model(seed).eval()}) for seed in (7, 7, 8)]
    first, again, other = (plan.depends_on()["helper 1"] for plan in plans)
    assert first == again != other
    x, y, index, _ = tiny_batch()
    for helper, reason in ((None, "HAT needs its helper"), ("runs/some", "not a path")):
        step = tiny_step(tiny_model(), "hat", helper=helper)
        with pytest.raises(UserError, match=reason):
            step(x, y, index)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"adversary": "none", **PLAIN}, "nothing beyond it"),
        ({"target": "distillation", **PLAIN}, "reads networks beside the model"),
    ],
)
def test_what_hat_refuses(options: dict[str, Any], reason: str) -> None:
    with pytest.raises(UserError, match=reason):
        resolve("hat", options)


def test_hat_makes_the_passes_that_are_counted() -> None:
    seen, expected = counted_in_an_update("hat")
    assert seen == expected
