"""The rows of FastAT_Benchmark: formulas, refusals, and what their state does.

Every mode, resuming and the count of passes are tested for all recipes together
(``test_modes.py``, ``test_step_state.py``, ``test_cost.py``).
"""

from __future__ import annotations

from typing import Any

import fastat_formulas as formulas
import pytest
import torch
from test_cost import counted_in_an_update
from test_single_step_methods import batches, trained
from tiny import EPS, TinyNet, assert_same, tiny_batch, tiny_model, tiny_step
from tiny_capture import capture
from torch import nn

from fastadv.algorithms.adversaries import fgsm_fuap, fgsm_mep, fgsm_pco, fgsm_uap
from fastadv.algorithms.adversaries.zero_grad import quantile
from fastadv.algorithms.resolution import resolve
from fastadv.errors import UserError


@pytest.mark.parametrize("share", [0.0, 0.35, 0.9, 1.0])
def test_zero_grad(share: float) -> None:
    model, data = tiny_model(), batches(3)
    step = trained("zero-grad", data, zero_share=share)
    formulas.zero_grad(model, data, share)
    assert_same(step.model, model)


@pytest.mark.parametrize("share", [0.0, 0.2, 0.35, 0.5, 1.0])
def test_the_quantile_is_torchs(share: float) -> None:
    values = torch.rand(5, 108, dtype=torch.float64)
    expected = torch.quantile(values, share, dim=1)
    torch.testing.assert_close(quantile(values, share), expected, rtol=0, atol=1e-15)


@pytest.mark.parametrize("parts", [1, 3, 4])
def test_ssat(parts: int) -> None:
    model, data = tiny_model(), batches(4, 16)
    step = trained("ssat", data, step_parts=parts)
    gone = formulas.ssat(model, data, parts)
    assert_same(step.model, model)
    assert {0, parts} <= set(gone)
    assert parts == 1 or set(gone) - {0, parts}


def test_ssat_counts_an_image_as_unmoved_by_its_step_alone() -> None:
    """An image that is misclassified at once stays where it is, which is no zero gradient."""
    x, y, index, _ = tiny_batch()
    step = tiny_step(tiny_model(), "ssat", start="center")
    y = (step.model.eval()(x).argmax(1) + 1) % 4  # all wrong, here and in training mode
    step.model.train()
    wrong = step.model(x).argmax(1) != y
    assert wrong.any()
    seen = []
    unmoved = step.plan.adversary.unmoved
    step.plan.adversary.unmoved = lambda *given: (
        seen.append((given, unmoved(*given))) or seen[-1][1]
    )  # type: ignore
    step(x, y, index)
    ((_, attacked), found) = seen[0]
    assert (attacked.x_adv == x).flatten(1).all(1).any()
    assert not found.any()


def rough_model() -> TinyNet:
    """A network that a step of eps along the gradient often carries to a smaller loss."""
    model = tiny_model()
    with torch.no_grad():
        model.bn2.weight *= 100
    return model


@pytest.mark.parametrize(
    ("method", "wide", "limit"),
    [("rs-aaer", False, 100.0), ("n-aaer", True, 100.0), ("rs-aaer", False, 0.2)],
)
def test_aaer(method: str, wide: bool, limit: float) -> None:
    model, data = rough_model(), batches(6)
    options = {"fall_weight": 2.5, "change_weight": 1.5, "change_limit": limit}
    step = tiny_step(rough_model(), method, **options)
    losses = [step(x, y, index)["loss"].item() for x, y, index in data]
    expected, counts, aways = formulas.aaer(model, data, 2.5, 1.5, wide, limit)
    assert_same(step.model, model)
    assert losses == pytest.approx(expected, rel=1e-10)
    assert any(0 < count < 8 for count in counts)
    assert any(away > 0 for away in aways)
    assert (limit == 100.0) != any(away > limit for away in aways)


@pytest.mark.parametrize("momentum_of", ["update", "attack"])
@pytest.mark.parametrize(("method", "classes"), [("fgsm-uap", False), ("fgsm-cuap", True)])
def test_universal_perturbations(method: str, classes: bool, momentum_of: str) -> None:
    model, data = tiny_model(), [*batches(3), *batches(2, 3)]
    step = trained(method, data, momentum_of=momentum_of)
    kept = formulas.universal(model, data, fgsm_uap.INITIAL, classes, momentum_of == "update")
    assert_same(step.model, model)
    torch.testing.assert_close(EPS * step.state["universal"], kept, rtol=0, atol=1e-12)
    assert len({*data[-1][1].tolist()}) < 4  # a class without an image


def test_perturbations_of_like_features() -> None:
    model, data = tiny_model(), batches(5)
    step = trained("fgsm-fuap", data, universal_groups=6)
    streams = (fgsm_uap.INITIAL, fgsm_fuap.INITIAL)
    kept, layers, seen = formulas.featured(model, data, 6, *streams)
    assert_same(step.model, model)
    torch.testing.assert_close(EPS * step.state["universal"], kept, rtol=0, atol=1e-12)
    found = step.state["universal_grouper"][0]
    expected = torch.cat([tensor.flatten() for tensor in layers])
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-11)
    assert step.state["universal_updates"] == 5
    assert 1 < len(seen) < 6


def test_features_are_those_of_a_linear_classifier() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 6), nn.Flatten()).double()
    x, y, index, _ = tiny_batch()
    step = tiny_step(model, "fgsm-fuap")
    with pytest.raises(UserError, match="take 'fgsm-cuap'"):
        step(x, y, index)


@pytest.mark.parametrize("method", ["fgsm-rs-cs", "fgsm-mep-cs"])
def test_smooth_convergence(method: str) -> None:
    """Epochs of two updates, of batches of two sizes; the term is absent in 0, 1 and the last."""
    model = tiny_model()
    sizes = [8, 5] * 6
    data = [tiny_batch(size, seed=update)[:3] for update, size in enumerate(sizes)]
    times = {"total_steps": 12, "steps_per_epoch": 2}
    step = trained(method, data, loss_stride=0.06, **times)
    initial = fgsm_mep.INITIAL if method == "fgsm-mep-cs" else None
    signs = formulas.converging(model, data, 2, 0.06, initial)
    assert_same(step.model, model)
    assert {*signs[:4], *signs[-2:]} == {0.0}
    assert {*signs[4:-2]} == {-1.0, 0.0, 1.0}


def test_pco() -> None:
    model, data = tiny_model(), batches(4)
    index = data[0][2]  # the same samples in every epoch
    data = [(x, y, index) for x, y, _ in data]
    step = trained("fgsm-pco", data, total_steps=4, steps_per_epoch=1, step_scale=1.7)
    kept = formulas.pco(model, data, fgsm_pco.INITIAL, 1.7)
    assert_same(step.model, model)
    torch.testing.assert_close(step.state["perturbations"], kept, rtol=0, atol=1e-12)


def test_two_changes_are_compared_only_where_there_are_two() -> None:
    x, y, index, _ = tiny_batch()
    step = tiny_step(tiny_model(), "pgd", regularizer="equal-changes")
    with pytest.raises(UserError, match="such as 'fgsm-pco'"):
        step(x, y, index)


STATEFUL = ("fgsm-uap", "fgsm-cuap", "fgsm-fuap", "fgsm-rs-cs", "fgsm-mep-cs", "fgsm-pco")


@pytest.mark.parametrize("method", STATEFUL)
def test_what_an_update_that_does_not_count_leaves_in_the_state(method: str) -> None:
    x, y, index, _ = tiny_batch()
    times = {"total_steps": 9, "steps_per_epoch": 9}
    step = capture(tiny_step(tiny_model(), method, averaging="none", **times))
    step(x, y, index)
    before = {name: tensor.clone() for name, tensor in step.state.items()}
    with torch.no_grad():
        step.model.linear.bias[0] = float("nan")
    step(x, y, index)
    assert not step.healthy()
    for name, tensor in step.state.items():
        assert torch.equal(tensor, before[name]), name


def test_the_perturbation_of_all_images_follows_the_radius() -> None:
    x, y, index, _ = tiny_batch()
    step = tiny_step(tiny_model(), "fgsm-uap", eps=0.05)
    step(x, y, index)
    assert {*step.state["universal"].abs().flatten().tolist()} <= {0.0, 1.25}


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("ssat", {"attack_bn": "eval"}),
        ("ssat", {"step_parts": 1}),
        ("ssat", {"step_parts": 5, "regularizer": "advlc"}),
        ("zero-grad", {"attack_bn": "eval"}),
        ("pgd", {"regularizer": "abnormal"}),
        ("pgd", {"regularizer": "smooth-convergence"}),
        ("pgd", {"attack_loss": "smoothed"}),
        ("fgsm-cuap", {"regularizer": "none"}),
        ("fgsm-fuap", {"attack_bn": "eval"}),
        ("fgsm-uap", {"momentum_of": "attack"}),
        ("fgsm-pco", {"regularizer": "none"}),
        ("ssat", {"regularizer": "equal-changes"}),
        ("fast", {"regularizer": "smooth-convergence", "objective": "trades"}),
    ],
)
def test_combinations_make_the_passes_that_are_counted(method: str, options: Any) -> None:
    seen, expected = counted_in_an_update(method, **options)
    assert seen == expected


@pytest.mark.parametrize(
    ("method", "options", "reason"),
    [
        ("fgsm-uap", {"start": "uniform"}, "this adversary begins where its own definition says"),
    ],
)
def test_refusals(method: str, options: dict[str, Any], reason: str) -> None:
    with pytest.raises(UserError, match=reason):
        resolve(method, options)


@pytest.mark.parametrize("method", ["fgsm-uap", "rs-aaer", "fgsm-rs-cs"])
def test_an_update_of_several_calls_is_refused_with_the_reason(method: str) -> None:
    x, y, index, _ = tiny_batch()
    step = tiny_step(tiny_model(), method, total_steps=4, steps_per_epoch=2)
    with pytest.raises(UserError, match=r"update=False is not possible with .* call"):
        step(x, y, index, update=False)


def test_a_shared_perturbation_needs_a_cube() -> None:
    with pytest.raises(UserError, match="take norm='linf'"):
        tiny_step(tiny_model(), "fgsm-uap", norm="l2")


def test_the_penalty_of_abnormal_examples_is_refused_without_a_start() -> None:
    x, y, index, _ = tiny_batch()
    step = tiny_step(tiny_model(), "standard", regularizer="abnormal")
    with pytest.raises(UserError, match="an adversary with gradient steps"):
        step(x, y, index)
