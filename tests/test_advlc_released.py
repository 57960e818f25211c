"""The released code of AdvLC as it runs: the attack begins at x plus its input gradient."""

from __future__ import annotations

import pytest
import torch
from single_step_formulas import uniform
from test_cost import counted_in_an_update
from test_gradalign import saturated
from tiny import CLASSES, EPS, assert_same, descend, sgd, tiny_batch, tiny_model, tiny_step
from tiny_run import assert_same_run, run
from torch import Tensor, nn
from torch.nn import functional

from fastadv.algorithms.resolution import resolve
from fastadv.engine import noise
from fastadv.engine.noise import Stream
from fastadv.errors import UserError
from fastadv.threat import Threat

ROWS = ("fgsm-n", "pgd-zero", "advlc", "advlc-swa", "fgsm-n-advlc", "fgsm-n-advlc-swa")
ROWS += ("fgsm-n-advlc-l1",)
WEIGHT, SHARE = 0.7, 0.25


def slope(model: nn.Module, at: Tensor, y: Tensor) -> Tensor:
    at = at.detach().requires_grad_()
    return torch.autograd.grad(functional.cross_entropy(model(at), y), at)[0]


def released(model: nn.Module, noisy: bool, steps: int, alpha: float, count: int = 3) -> None:
    """Each update: f(x~) for the loss and g, then the attack from x~ + g, then f(x')."""
    optimizer = sgd(model)
    for update, (x, y, index) in enumerate(saturated(count)):
        if noisy:
            drawn = uniform(index, tuple(x.shape[1:]), update, Stream(noise.AUGMENTATION))
            x = (x + EPS * drawn).clamp(0, 1)
        x = x.requires_grad_()
        natural = model(x)
        loss = functional.cross_entropy(natural, y)
        moved = torch.autograd.grad(loss, x, retain_graph=True)[0]
        x = x.detach()
        for _ in range(steps):
            found = slope(model, (x + moved).clamp(0, 1), y)
            moved = (moved + alpha * found.sign()).clamp(-EPS, EPS)
            moved = (x + moved).clamp(0, 1) - x
        adversarial = model(x + moved)
        change = (natural - adversarial).abs().flatten()
        largest = change.topk(int(SHARE * change.numel())).values.sum() / len(y)
        descend(optimizer, functional.cross_entropy(adversarial, y) + WEIGHT * largest)


@pytest.mark.parametrize("mode", ["eager", pytest.param("compiled", marks=pytest.mark.slow)])
@pytest.mark.parametrize("method", ["fgsm-n-advlc", "advlc"])
def test_three_updates_are_those_of_the_released_code(method: str, mode: str) -> None:
    model, other = tiny_model(), tiny_model()
    options = {"reg_weight": WEIGHT, "top_fraction": SHARE, "variant": "advlc"}
    attack = {} if method == "fgsm-n-advlc" else {"steps": 3, "alpha": 0.04}
    step = tiny_step(model, method, mode=mode, **options, **attack)
    for x, y, index in saturated(3):
        step(x, y, index)
    if method == "fgsm-n-advlc":
        released(other, noisy=True, steps=1, alpha=EPS)
    else:
        released(other, noisy=False, steps=3, alpha=0.04)
    assert_same(model, other)
    passes = 3 if method == "fgsm-n-advlc" else 5
    assert int(model.bn1.num_batches_tracked) == 3 * passes


def test_the_form_of_the_paper_is_another_one() -> None:
    """The start changes the update, and the paper's form has one pass less."""
    moved = []
    for variant in ("paper", "advlc"):
        model = tiny_model()
        step = tiny_step(model, "fgsm-n-advlc", variant=variant)
        x, y, index = saturated(1)[0]
        step(x, y, index)
        moved.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
        assert int(model.bn1.num_batches_tracked) == {"paper": 2, "advlc": 3}[variant]
    before = torch.cat([p.detach().flatten() for p in tiny_model().parameters()])
    assert (moved[0] - moved[1]).norm() > 0.01 * (moved[0] - before).norm()


@pytest.mark.parametrize("method", ROWS)
def test_every_row_has_both_forms_and_counts_its_passes(method: str) -> None:
    paper, code = (resolve(method, {"variant": name}) for name in ("paper", "advlc"))
    assert resolve(method).slots == paper.slots
    assert paper.slots | {"start": "gradient"} == code.slots
    assert paper.options == code.options
    assert code.bn_updates == ("adversarial",)
    seen, expected = counted_in_an_update(method, variant="advlc")
    assert seen == expected


@pytest.mark.parametrize(
    "options",
    [
        {"attack_bn": "eval"},
        {"regularizer": "logitalign"},
        {"objective": "trades"},
        {"weights": "awp"},
        {"adversary": "pgd", "restarts": 2},
        {"adversary": "n-fgsm"},
    ],
    ids=str,
)
def test_the_passes_beside_other_parts_are_counted(options: dict[str, object]) -> None:
    seen, expected = counted_in_an_update("fgsm-n-advlc", start="gradient", **options)
    assert seen == expected


@pytest.mark.parametrize("method", ["fgsm-n-advlc", "advlc"])
def test_a_captured_step_computes_the_same(method: str) -> None:
    options = {"start": "gradient"}
    assert_same_run(run(method, **options), run(method, "captured", **options), tolerance=1e-9)


@pytest.mark.slow
def test_a_compiled_step_computes_the_same() -> None:
    options = {"start": "gradient"}
    eager = run("fgsm-n-advlc", **options)
    assert_same_run(eager, run("fgsm-n-advlc", "compiled", **options), tolerance=1e-9)


def statistics_after(cumulative: bool, bn: str) -> tuple[nn.Module, nn.Module]:
    """A model after one update of FGSM with the start, and one after the passes of that update."""
    x, y, index, _ = tiny_batch()
    models = [tiny_model(), tiny_model()]
    for model in models:
        for norm in (model.bn1, model.bn2):
            norm.momentum = None if cumulative else norm.momentum
    options = {"regularizer": "advlc", "start": "gradient", "attack_bn": bn}
    optimizer = sgd(models[0], lr=0.0)
    step = tiny_step(models[0], "fgsm", optimizer=optimizer, **options)
    step(x, y, index)
    other = models[1].train(bn == "train")
    moved = slope(other, x, y)
    found = slope(other, (x + moved).clamp(0, 1), y)
    x_adv = (x + (moved + EPS * found.sign()).clamp(-EPS, EPS)).clamp(0, 1)
    other.train()
    with torch.no_grad():
        if bn == "eval" or cumulative:
            other(x)
        other(x_adv)
    return models[0], models[1]


@pytest.mark.parametrize(("cumulative", "bn"), [(False, "train"), (False, "eval"), (True, "train")])
def test_the_clean_pass_moves_the_statistics_only_where_the_attack_did_not(
    cumulative: bool, bn: str
) -> None:
    assert_same(*statistics_after(cumulative, bn))


def test_a_targeted_attack_begins_down_the_gradient() -> None:
    x, y, index, _ = tiny_batch()
    targets = (y + 1) % CLASSES
    models = [tiny_model(), tiny_model()]
    threat = Threat("linf", EPS, targeted=True)
    tiny_step(models[0], "fgsm", start="gradient", threat=threat)(x, y, index, targets=targets)
    moved = -slope(models[1], x, targets)
    found = slope(models[1], (x + moved).clamp(0, 1), targets)
    x_adv = (x + (moved - EPS * found.sign()).clamp(-EPS, EPS)).clamp(0, 1)
    descend(sgd(models[1]), functional.cross_entropy(models[1](x_adv), y))
    assert_same(*models)


def test_an_update_of_several_calls_is_refused() -> None:
    """The start is as far away as the gradient of a mean over a call is long."""
    x, y, index, _ = tiny_batch()
    step = tiny_step(tiny_model(), "fgsm-n", variant="advlc")
    with pytest.raises(UserError, match="the gradient of the mean loss of a call"):
        step(x, y, index, update=False)
