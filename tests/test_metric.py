"""Attacks and evaluations with labels of any kind, losses and metrics of the user's own, and models
whose logits are in a tuple."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable
from math import sqrt
from pathlib import Path
from typing import Any

import pytest
import torch
from test_distributed import free_port
from test_labels import Head, drawn, entropy, mixup, several, squares
from tiny import EPS, tiny_batch, tiny_model
from torch import Tensor, distributed, nn
from two_processes import in_two_processes

import fastadv
from fastadv.engine.process.distributed import leave
from fastadv.errors import NotFiniteError, UserError
from fastadv.evaluation.intervals import wilson

x, y, _, start = tiny_batch()
ALPHA = EPS / 4
BOX = {"eps": EPS}


def climbed(
    model: nn.Module, x: Tensor, loss: Callable[[Tensor], Tensor], alpha: float, steps: int
) -> Tensor:
    """PGD from the images themselves, in eval mode, on the sum of ``loss(logits)`` (B,)."""
    model.eval()
    x_adv = x
    for _ in range(steps):
        x_adv = x_adv.detach().requires_grad_()
        (gradient,) = torch.autograd.grad(loss(model(x_adv)).sum(), x_adv)
        moved = (x_adv + alpha * gradient.sign()).clamp(x - EPS, x + EPS)
        x_adv = moved.clamp(0, 1).detach()
    return x_adv


LOSSES: dict[str, tuple[nn.Module, Tensor, Any, Any]] = {
    "soft labels": (tiny_model(), mixup(), None, entropy(mixup())),
    "soft labels in float16": (tiny_model(), mixup().half(), None, entropy(mixup().half())),
    "several labels": (tiny_model(), drawn(8, 4), several, None),
    "one logit": (Head(1), drawn(8, 1), squares, None),
    "no class axis": (Head(), drawn(8), lambda z, y: (z - y).abs(), None),
    "a map": (Head(2, 3), drawn(8, 2, 3), squares, None),
    "classes": (tiny_model(), y, lambda z, y: -z.gather(1, y[:, None])[:, 0], None),
}


@pytest.mark.parametrize("name", LOSSES)
def test_an_attack_follows_the_loss(name: str) -> None:
    model, labels, criterion, loss = LOSSES[name]
    loss = loss or (lambda z: criterion(z, labels))
    options = {**BOX, "criterion": criterion, "random_start": False}
    found = fastadv.attack(model, x, labels, "pgd-3", alpha=ALPHA, **options)
    torch.testing.assert_close(found, climbed(model, x, loss, ALPHA, 3), rtol=0, atol=1e-12)
    found = fastadv.attack(model, x, labels, "fgsm", **BOX, criterion=criterion)
    torch.testing.assert_close(found, climbed(model, x, loss, EPS, 1), rtol=0, atol=1e-12)


def test_restarts_keep_the_largest_criterion() -> None:
    model, labels, criterion, _ = LOSSES["a map"]
    once, often = (
        criterion(model(fastadv.attack(model, x, labels, name, **BOX, criterion=criterion)), labels)
        for name in ("pgd-1", "pgd-1-4")
    )
    assert (often >= once).all()
    assert (often > once).any()


def parts(labels: Tensor) -> list[tuple[Tensor, Tensor]]:
    return [(x[:5], labels[:5]), (x[5:], labels[5:])]


def test_the_accuracy_of_soft_labels_is_that_of_their_largest_entry() -> None:
    model, soft = tiny_model(), mixup()
    scores = fastadv.evaluate(model, parts(soft), ("clean", "fgsm"), **BOX)
    x_adv = climbed(model, x, entropy(soft), EPS, 1)
    for name, images in (("clean", x), ("fgsm", x_adv)):
        right = (model(images).argmax(1) == soft.argmax(1)).sum().item()
        assert scores[name] == pytest.approx(right / 8)
        assert scores.interval(name) == wilson(scores[name], 8)


@pytest.mark.parametrize("shared", [False, True])
def test_the_mean_of_a_metric_and_its_interval(shared: bool) -> None:
    model, labels, criterion, _ = LOSSES["a map"]

    def error(z: Tensor, y: Tensor) -> Tensor:
        return (z - y).abs().amax((1, 2))

    options = {**BOX, "criterion": criterion, "metric": error, "shared": shared}
    scores = fastadv.evaluate(model, parts(labels), ("clean", "fgsm"), **options)
    assert scores.n == 8
    x_adv = climbed(model, x, lambda z: criterion(z, labels), EPS, 1)
    for name, images in (("clean", x), ("fgsm", x_adv)):
        values = error(model(images), labels).tolist()
        mean = sum(values) / 8
        reach = 1.959963984540054 * sqrt(sum((v - mean) ** 2 for v in values) / 7) / sqrt(8)
        assert scores[name] == pytest.approx(mean, rel=1e-12)
        assert scores.interval(name) == pytest.approx((mean - reach, mean + reach), rel=1e-9)
    assert scores["fgsm"] > scores["clean"]


def test_bool_values_are_counted() -> None:
    model, labels, criterion, _ = LOSSES["several labels"]

    def most_right(z: Tensor, y: Tensor) -> Tensor:
        return ((z > 0) == (y > 0.5)).sum(1) >= 2

    options = {**BOX, "criterion": criterion, "metric": most_right}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        scores = fastadv.evaluate(model, parts(labels), ("clean", "fgsm", "pgd-2-3"), **options)
    x_adv = climbed(model, x, lambda z: criterion(z, labels), EPS, 1)
    for name, images in (("clean", x), ("fgsm", x_adv)):
        right = int(most_right(model(images), labels).sum())
        assert 0 < right < 8
        assert scores[name] == pytest.approx(right / 8)
        assert scores.interval(name) == wilson(scores[name], 8)


def among_three(z: Tensor, y: Tensor) -> Tensor:
    return (z.topk(3).indices == y[:, None]).any(1)


def test_a_metric_of_classes_needs_no_criterion() -> None:
    model = tiny_model()
    plain = fastadv.evaluate(model, parts(y), ("clean", "pgd-3"), **BOX)
    right = fastadv.evaluate(
        model, parts(y), ("clean", "pgd-3"), **BOX, metric=lambda z, y: z.argmax(1) == y
    )
    as_float = fastadv.evaluate(
        model, parts(y), ("clean", "pgd-3"), **BOX, metric=lambda z, y: (z.argmax(1) == y).float()
    )
    assert plain == right == pytest.approx(as_float)
    top = fastadv.evaluate(model, parts(y), ("pgd-3",), **BOX, metric=among_three)
    assert top["pgd-3"] > plain["pgd-3"]


def test_without_an_attack_a_metric_says_what_labels_may_be() -> None:
    model, labels, _, _ = LOSSES["a map"]
    scores = fastadv.evaluate(model, parts(labels), ("clean", "noise-0.1"), **BOX, metric=squares)
    assert scores["clean"] == pytest.approx(squares(model(x), labels).mean().item())


class Pair(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return x, self.model(x)


@pytest.mark.parametrize("output", [1, lambda found: found[1]])
def test_the_logits_of_a_tuple_are_attacked(output: Any) -> None:
    model = tiny_model()
    pair = Pair(model)
    for name in ("pgd-3", "cw-3", "fgsm"):
        expected = fastadv.attack(model, x, y, name, **BOX)
        assert torch.equal(fastadv.attack(pair, x, y, name, **BOX, output=output), expected)
    scores = fastadv.evaluate(model, parts(y), ("clean", "pgd-3"), **BOX)
    assert fastadv.evaluate(pair, parts(y), ("clean", "pgd-3"), **BOX, output=output) == scores


CRITERION = {"criterion": several}
BAD: list[tuple[dict[str, Any], Tensor, str]] = [
    ({"criterion": nn.BCEWithLogitsLoss()}, drawn(8, 4), "not one number: pass reduction='none'"),
    ({"criterion": nn.BCEWithLogitsLoss(reduction="none")}, drawn(8, 4), "take the mean over"),
    ({"criterion": lambda z, y: several(z, y).detach()}, drawn(8, 4), "by a gradient"),
    ({"criterion": "bce"}, drawn(8, 4), "criterion is a function of logits and y"),
    ({"name": "cw-2", **CRITERION}, drawn(8, 4), "'cw-2' compares classes and follows no"),
    ({"name": "cw-margin-2"}, mixup(), "'cw-margin-2' needs one class for each image"),
    ({}, drawn(8, 4), "sums to 1"),
    ({}, mixup()[:, :3] / mixup()[:, :3].sum(1, keepdim=True).clamp(min=1e-9), "3 classes"),
    ({}, drawn(8), "for other labels pass a loss of your own, criterion="),
    (CRITERION, drawn(4, 4), "soft labels"),
    ({"output": 3}, y, "outside of the 2 entries"),
]


def attacked(model: nn.Module, labels: Tensor, name: str, **options: Any) -> Tensor:
    return fastadv.attack(model, x, labels, name, **options)


def judged(model: nn.Module, labels: Tensor, name: str, **options: Any) -> dict[str, float]:
    return fastadv.evaluate(model, [(x, labels)], (name,), **options)


@pytest.mark.parametrize("use", ["attack", "evaluate"])
@pytest.mark.parametrize("number", range(len(BAD)))
def test_what_cannot_be_attacked_is_refused(number: int, use: str) -> None:
    options, labels, sentence = BAD[number]
    options = {"name": "pgd-2", **BOX, **options}
    name = options.pop("name")
    model = Pair(tiny_model()) if "output" in options else tiny_model()
    if use == "evaluate" and "criterion" in options:
        options["metric"] = several
    sentence = "sum" if "sums" in sentence else sentence
    call = attacked if use == "attack" else judged
    with pytest.raises(UserError, match=sentence) as raised:
        call(model, labels, name, **options)
    assert "\n" not in str(raised.value)


def test_the_kl_follows_no_criterion() -> None:
    with pytest.raises(UserError, match="objective='kl' compares classes"):
        fastadv.attack(tiny_model(), x, drawn(8, 4), "pgd-2", objective="kl", **CRITERION)


@pytest.mark.parametrize(
    ("metric", "sentence"),
    [
        (lambda z, y: several(z, y).mean(), "metric must return one value per sample"),
        (lambda z, y: z, "bool or float tensor of shape \\(5,\\), not torch.float64 of \\(5, 4\\)"),
        (lambda z, y: y[:, 0].long(), "not torch.int64"),
        (lambda z, y: several(z, y) > 0 if len(z) == 5 else several(z, y), "return one kind"),
        ("auc", "metric is a function of logits and y"),
        (None, "Accuracy is of classes, and y are none: pass metric="),
    ],
)
def test_a_metric_that_is_no_value_per_image_is_refused(metric: Any, sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        fastadv.evaluate(
            tiny_model(), parts(drawn(8, 4)), ("clean", "fgsm"), **CRITERION, metric=metric
        )


@pytest.mark.parametrize("name", ["apgd-ce-2", "apgd-ce-2+square-2", "quick"])
def test_a_metric_of_an_attack_that_follows_classes_is_refused(name: str) -> None:
    for metric in (several, lambda z, y: z.argmax(1) == y):
        with pytest.raises(UserError, match=f"The attack '{re.escape(name)}' .*no metric"):
            fastadv.evaluate(tiny_model(), parts(y), ("clean", name), metric=metric)


def test_values_that_are_not_finite_are_an_error() -> None:
    with pytest.raises(NotFiniteError, match="metric"):
        fastadv.evaluate(
            tiny_model(), parts(y), ("clean",), metric=lambda z, y: (z[:, 0] * 0).log() * 0
        )


def worker(rank: int, port: int, out: str) -> None:
    address = f"tcp://127.0.0.1:{port}"
    distributed.init_process_group("gloo", init_method=address, rank=rank, world_size=2)
    torch.save(dict(evaluated(shared=True)), f"{out}.{rank}")
    leave()


def evaluated(*, shared: bool) -> dict[str, float]:
    batches = [(x[k : k + 3], drawn(8, 4)[k : k + 3]) for k in (0, 3, 6)]
    options = {**BOX, "criterion": squares, "metric": squares, "shared": shared}
    return fastadv.evaluate(tiny_model(), batches, ("clean", "fgsm"), **options)


def test_two_processes_share_a_metric(tmp_path: Path) -> None:
    out = str(tmp_path / "scores")
    in_two_processes(worker, free_port(), out)
    for rank in range(2):
        assert torch.load(f"{out}.{rank}") == pytest.approx(evaluated(shared=False), rel=1e-12)
