"""GradAlign with FGSM as published: three passes, one gradient for the attack and the term."""

from __future__ import annotations

import pytest
import torch
from single_step_formulas import Batches, boxed, uniform
from test_cost import counted_in_an_update
from tiny import CLASSES, EPS, assert_same, descend, sgd, tiny_batch, tiny_model, tiny_step
from tiny_run import assert_same_run, run
from torch import Tensor, nn
from torch.nn import functional

from fastadv.algorithms.regularizers.gradalign import NEAR
from fastadv.threat import Threat

WEIGHT = 3.0


def saturated(count: int) -> Batches:
    """Batches of which a third of the pixels are 0 or 1."""
    found = []
    for update in range(count):
        x, y, index, _ = tiny_batch(seed=update)
        found.append(((1.5 * x - 0.25).clamp(0, 1), y, index))
    assert all(0.2 < ((x == 0) | (x == 1)).double().mean() < 0.5 for x, _, _ in found)
    return found


def clip(x: Tensor, edges: str) -> Tensor:
    """x in [0,1]; its derivative at a tie is that of max and min of different versions of torch."""
    if edges == "whole":
        return x + (x.clamp(0, 1) - x).detach()
    one, zero = torch.ones(1).double(), torch.zeros(1).double()
    if edges == "half":
        return torch.maximum(torch.minimum(x, one), zero)
    inside = ((x > 0) & (x < 1)).double()
    return (x.clamp(0, 1) - inside * x).detach() + inside * x


def published(model: nn.Module, batches: Batches, edges: str, smoothing: float = 0.0) -> None:
    """Each update: f(x) for the step and g1, f(x'), f(x + noise) for g2, in this order."""
    optimizer = sgd(model)
    for update, (x, y, index) in enumerate(batches):
        delta = torch.zeros_like(x).requires_grad_()
        loss = functional.cross_entropy(model(clip(x + delta, edges)), y)
        first = torch.autograd.grad(loss, delta)[0]
        x_adv = boxed(x + 1.25 * EPS * first.sign(), x)
        right = functional.one_hot(y, CLASSES).double()
        label = (1 - smoothing) * right + smoothing * (1 - right) / (CLASSES - 1)
        loss = -(label * model(x_adv).log_softmax(1)).sum(1).mean()
        drawn = EPS * uniform(index, tuple(x.shape[1:]), update, NEAR)
        near = (x + drawn).requires_grad_()
        value = functional.cross_entropy(model(near), y)
        second = torch.autograd.grad(value, near, create_graph=True)[0]
        cosines = [
            (a * b).sum() / a.norm() / b.norm()
            for a, b in zip(first, second, strict=True)
            if a.any()
        ]
        descend(optimizer, loss + WEIGHT * (1 - sum(cosines) / len(cosines)))


@pytest.mark.parametrize("mode", ["eager", pytest.param("compiled", marks=pytest.mark.slow)])
@pytest.mark.parametrize("edges", ["whole", "half", "none"])
def test_three_updates_are_the_published_ones(edges: str, mode: str) -> None:
    model, other, data = tiny_model(), tiny_model(), saturated(3)
    step = tiny_step(model, "gradalign", mode=mode, reg_weight=WEIGHT, edge_gradient=edges)
    assert step.plan.shares_gradient
    for x, y, index in data:
        step(x, y, index)
    published(other, data, edges)
    assert_same(model, other)


def test_the_three_forms_differ_at_saturated_pixels() -> None:
    models = []
    for edges in ("whole", "half", "none"):
        models.append(tiny_model())
        published(models[-1], saturated(2), edges)
    weights = [torch.cat([p.detach().flatten() for p in m.parameters()]) for m in models]
    before = torch.cat([p.detach().flatten() for p in tiny_model().parameters()])
    moved = (weights[0] - before).norm()
    assert all((weights[0] - other).norm() > 1e-3 * moved for other in weights[1:])
    assert (weights[1] - weights[2]).norm() > 1e-3 * moved


def test_a_smoothed_label_is_fitted_while_both_gradients_are_of_the_hard_one() -> None:
    model, other, data = tiny_model(), tiny_model(), saturated(2)
    options = {"target": "label-smoothing", "smoothing": 0.3, "edge_gradient": "whole"}
    step = tiny_step(model, "gradalign", reg_weight=WEIGHT, **options)
    assert step.plan.shares_gradient
    for x, y, index in data:
        step(x, y, index)
    published(other, data, "whole", smoothing=0.3)
    assert_same(model, other)


def forwards(step_options: dict[str, object], **of_call: Tensor) -> int:
    model, seen = tiny_model(), []
    step = tiny_step(model, "gradalign", **step_options)
    x, y, index, _ = tiny_batch()
    step(x, y, index)
    model.register_forward_pre_hook(lambda *_: seen.append(1))
    step(x, y, index, **of_call)
    return len(seen)


def test_the_gradient_is_shared_only_where_it_is_that_of_the_regularizer() -> None:
    _, y, _, start = tiny_batch()
    targeted = Threat("linf", EPS, targeted=True)
    assert forwards({}) == 3
    assert forwards({}, start=start) == 4  # the attack begins elsewhere
    assert forwards({"start": "uniform"}) == 4
    assert forwards({"attack_loss": "fit"}) == 4  # perhaps another loss than the regularizer's
    assert forwards({"threat": targeted}, targets=(y + 1) % CLASSES) == 4
    assert forwards({"adversary": "fgsm-n"}) == 3
    assert forwards({"adversary": "fgsm-n", "attack_bn": "eval"}) == 4


def test_a_targeted_attack_keeps_the_gradient_of_the_label() -> None:
    """g1 is of y, the step is towards another class."""
    x, y, index = saturated(1)[0]
    targets = (y + 1) % CLASSES
    model, other = tiny_model(), tiny_model()
    options = {"reg_weight": WEIGHT, "edge_gradient": "whole"}
    step = tiny_step(model, "gradalign", threat=Threat("linf", EPS, targeted=True), **options)
    step(x, y, index, targets=targets)
    optimizer = sgd(other)
    gradients = []
    for label in (targets, y):
        at = x.clone().requires_grad_()
        loss = functional.cross_entropy(other(at), label)
        gradients.append(torch.autograd.grad(loss, at)[0])
    x_adv = boxed(x - EPS * gradients[0].sign(), x)
    loss = functional.cross_entropy(other(x_adv), y)
    near = (x + EPS * uniform(index, tuple(x.shape[1:]), 0, NEAR)).requires_grad_()
    value = functional.cross_entropy(other(near), y)
    second = torch.autograd.grad(value, near, create_graph=True)[0]
    cosines = functional.cosine_similarity(gradients[1].flatten(1), second.flatten(1))
    descend(optimizer, loss + WEIGHT * (1 - cosines.mean()))
    assert_same(model, other)


def test_a_captured_step_computes_the_same() -> None:
    assert_same_run(run("gradalign"), run("gradalign", "captured"), tolerance=1e-9)


@pytest.mark.slow
def test_a_compiled_step_computes_the_same() -> None:
    assert_same_run(run("gradalign"), run("gradalign", "compiled"), tolerance=1e-9)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"objective": "trades"},
        {"attack_loss": "fit"},
        {"start": "uniform"},
        {"adversary": "pgd"},
    ],
    ids=str,
)
def test_the_passes_are_those_that_are_counted(options: dict[str, str]) -> None:
    seen, expected = counted_in_an_update("gradalign", **options)
    assert seen == expected
