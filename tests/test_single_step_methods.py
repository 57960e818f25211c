"""GAT, NuAT, ELLE, FGSM-PGI and the random radii: formulas, refusals, and what their state does.

Every mode, resuming and the count of passes are tested for all recipes together
(``test_modes.py``, ``test_step_state.py``, ``test_cost.py``).
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import single_step_formulas as formulas
import torch
from test_cost import counted_in_an_update
from test_distributed import free_port, network
from tiny import EPS, assert_same, tiny_batch, tiny_model, tiny_step
from tiny_capture import capture
from tiny_staged import PAD, view_of
from torch import distributed, nn
from torch.nn import functional
from two_processes import in_two_processes

import fastadv
from fastadv.algorithms.adversaries import fgsm_bp, fgsm_mep, random_eps, random_eps_pgd
from fastadv.algorithms.contract import Batch
from fastadv.algorithms.guidance import LateWeight
from fastadv.algorithms.nuclear_norm import nuclear
from fastadv.algorithms.regularizers import elle
from fastadv.algorithms.resolution import resolve
from fastadv.algorithms.starts.bernoulli import SIGNS
from fastadv.engine.process.distributed import leave
from fastadv.errors import UserError
from fastadv.training.training_step import Step

STREAMS = (elle.FIRST, elle.SECOND, elle.BETWEEN)


def batches(count: int, size: int = 8) -> formulas.Batches:
    return [tiny_batch(size, seed=update)[:3] for update in range(count)]


def trained(
    method: str, data: formulas.Batches, *, crops: bool = False, weights: int = 2, **options: Any
) -> Step:
    """A step after ``data``, on the network drawn from the seed ``weights``."""
    step = tiny_step(tiny_model(weights), method, **options)
    for update, (x, y, index) in enumerate(data):
        step(x, y, index, view=view_of(len(y), update) if crops else None)
    assert step.healthy()
    return step


def rising(epoch: int) -> float:
    return 4.5 * min(epoch / (0.9 * 3), 1)


@pytest.mark.parametrize("attack_bn", ["eval", "train"])
def test_nuat(attack_bn: str) -> None:
    """Three epochs of three updates: the parity begins anew in each."""
    model, data = tiny_model(), batches(9)
    times = {"total_steps": 9, "steps_per_epoch": 3}
    step = trained("nuat", data, attack_bn=attack_bn, **times)
    weights = formulas.guided(model, data, SIGNS, formulas.nuclear, rising, 3, attack_bn)
    assert sorted({*weights}) == [0, rising(1), rising(2)]
    assert_same(step.model, model)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_the_nuclear_norm_of_a_change_that_is_not_finite_is_nan(bad: float) -> None:
    """So that the update does not count; the decomposition itself would raise."""
    change = torch.randn(5, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(nuclear(change), formulas.nuclear(change, torch.zeros(5, 4)))
    change[2, 1] = bad
    assert nuclear(change).isnan()


def test_gat() -> None:
    """In eight epochs the last one is in the last 14 percent."""
    model, data = tiny_model(), batches(16)
    step = trained("gat", data, total_steps=16, steps_per_epoch=2, reg_weight=3.0)
    weight = lambda epoch: 12.0 if epoch == 7 else 3.0  # noqa: E731
    weights = formulas.guided(model, data, SIGNS, formulas.change, weight, 2)
    assert weights[-3:] == [3.0, 12.0, 12.0]
    assert_same(step.model, model)


@pytest.mark.parametrize(
    ("method", "distance", "at_last"), [("gat", formulas.change, 10), ("nuat", formulas.nuclear, 4)]
)
def test_the_rows_of_fastat_attack_the_smoothed_loss(
    method: str, distance: Any, at_last: float
) -> None:
    """Its smoothing spreads over all four classes; NuAT's weight rises to the end of the run."""
    model, data = tiny_model(), batches(6)
    times = {"total_steps": 8, "steps_per_epoch": 2}
    step = trained(method, data, variant="fastat", averaging="none", **times)
    fit = lambda z, y: functional.cross_entropy(z, y, label_smoothing=0.4)  # noqa: E731
    weight = lambda epoch: at_last * (epoch / 4 if method == "nuat" else 1)  # noqa: E731
    bn = step.plan.options["attack_bn"]
    assert bn == {"gat": "eval", "nuat": "train"}[method]
    formulas.guided(model, data, SIGNS, distance, weight, 2, bn, fit)
    assert_same(step.model, model)


def test_the_weight_of_gat_rises_after_86_of_100_epochs() -> None:
    part = LateWeight()
    assert [part.ramp(epoch, 100) for epoch in (0, 85, 86, 99)] == [1, 1, 4, 4]


def test_without_the_length_of_an_epoch_every_second_update_of_the_run_is_meant() -> None:
    model, data = tiny_model(), batches(3)
    step = trained("gat", data, reg_ramp=False)
    formulas.guided(model, data, SIGNS, formulas.change, lambda _: 10.0, per_epoch=100)
    assert_same(step.model, model)


def test_elle() -> None:
    model, data = tiny_model(4), batches(4)
    step = trained("elle", data, weights=4, reg_weight=5.0)
    assert formulas.elle(model, data, STREAMS, 5.0) == [5.0] * 4
    assert_same(step.model, model)


def test_elle_a() -> None:
    model, data = tiny_model(4), batches(8)
    chosen = (0.3, 0.9)
    step = trained(
        "elle-a", data, weights=4, reg_weight=5.0, reg_sensitivity=chosen[0], reg_decay=chosen[1]
    )
    weights = formulas.elle(model, data, STREAMS, 5.0, *chosen)
    assert {0.0, 5.0, 4.5} <= set(weights)  # not yet, after a jump, after none
    assert_same(step.model, model)


@pytest.mark.parametrize("crops", [False, True])
@pytest.mark.parametrize(("method", "decay"), [("fgsm-mep", 0.3), ("fgsm-ep", 0.0)])
def test_fgsm_mep_and_ep(method: str, decay: float, crops: bool) -> None:
    model, data = tiny_model(), batches(5)
    index = data[0][2]  # the same samples in every epoch: their momenta add up
    data = [(x, y, index) for x, y, _ in data]
    times = {"total_steps": 5, "steps_per_epoch": 1}
    step = trained(method, data, crops=True, pad=PAD, reset_every=3, follow_crops=crops, **times)
    formulas.fgsm_mep(model, data, fgsm_mep.INITIAL, 3, decay, crops)
    assert_same(step.model, model)
    assert ("momenta" in step.state) == bool(decay)


@pytest.mark.parametrize(("method", "decay"), [("fgsm-mep", 0.3), ("fgsm-ep", 0.0)])
def test_the_gradient_at_the_start_clipped_to_the_range_of_images(
    method: str, decay: float
) -> None:
    """The step leaves from the start itself, which is outside of the range at some pixels."""
    model, data = tiny_model(), batches(4)
    index = data[0][2]
    data = [((1.2 * x - 0.1).clamp(0, 1), y, index) for x, y, _ in data]
    times = {"total_steps": 4, "steps_per_epoch": 1}
    step = trained(method, data, reset_every=2, clip_start=True, **times)
    formulas.fgsm_mep(model, data, fgsm_mep.INITIAL, 2, decay, clip=True)
    assert_same(step.model, model)


def test_fgsm_bp() -> None:
    """A short batch uses the first places, and a larger one has new ones."""
    model, data = tiny_model(), [*batches(2), *batches(2, 5), *batches(3, 10)]
    step = trained("fgsm-bp", data)
    kept = formulas.fgsm_bp(model, data, fgsm_bp.INITIAL)
    assert_same(step.model, model)
    torch.testing.assert_close(step.state["buffer"], kept, rtol=0, atol=1e-12)
    assert set(step.rank_local_state) == {"buffer"}


@pytest.mark.parametrize("sizes", [(5, 8), (8, 5)])
def test_fgsm_bp_resumes_whatever_the_size_of_the_first_batch(sizes: tuple[int, int]) -> None:
    data = [batches(1, size)[0] for size in sizes]
    step = trained("fgsm-bp", data)
    other = tiny_step(tiny_model(5), "fgsm-bp")
    other.load_state_dict(copy.deepcopy(step.state_dict()))
    other.model.load_state_dict(step.model.state_dict())
    other.optimizer.load_state_dict(copy.deepcopy(step.optimizer.state_dict()))
    for x, y, index in reversed(data):
        assert torch.equal(step(x, y, index)["loss"], other(x, y, index)["loss"])


def test_random_eps() -> None:
    model, data = tiny_model(), batches(4)
    step = trained("random-eps", data)
    formulas.random_eps(model, data, random_eps.RADIUS)
    assert_same(step.model, model)


@pytest.mark.parametrize("mode", ["eager", "captured"])
def test_random_radii_of_pgd_in_a_growing_ball(mode: str) -> None:
    model, data = tiny_model(), batches(6)
    times = {"total_steps": 6, "steps_per_epoch": 2}
    own = tiny_model()
    step = fastadv.step(
        own, formulas.sgd(own), "pgd", adversary="random-eps-pgd", steps=3, mode="eager",
        eps=fastadv.Ramp(0.0, EPS, 2), **times,
    )  # fmt: skip
    step = capture(step) if mode == "captured" else step
    for x, y, index in data:
        step(x, y, index)
    assert step.healthy()
    formulas.random_eps_pgd(model, data, random_eps_pgd.RADIUS, per_epoch=2, ramp=2, steps=3)
    assert_same(step.model, model)


def test_the_radii_are_those_of_a_truncated_normal() -> None:
    step = tiny_step(tiny_model(), "random-eps")
    count = 20_000
    x = torch.full((count, 3, 6, 6), 0.5, dtype=torch.float64)
    step(*(part[:8] for part in (x, torch.zeros(count).long(), torch.arange(count))))
    index, y = torch.arange(count), torch.zeros(count).long()
    batch = Batch(x, y, index, torch.zeros((), dtype=torch.int64), step.threat)
    radii = step.plan.adversary._with_radii(batch).threat.eps
    assert radii.min() >= 0
    assert radii.max() <= EPS
    # |N(0, 1/2)| below 1: mean and median of the truncated distribution.
    assert abs(radii.mean().item() / EPS - 0.3612) < 0.005
    assert abs(radii.median().item() / EPS - 0.3200) < 0.006


def test_the_radius_of_random_eps_follows_a_warm_up_of_eps() -> None:
    model = tiny_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    step = fastadv.step(
        model, optimizer, "random-eps", eps=fastadv.Ramp(0.0, EPS, 2), steps_per_epoch=1,
        total_steps=3, mode="eager",
    )  # fmt: skip
    x, y, index, _ = tiny_batch()
    seen = []
    make = step.plan.adversary.make
    step.plan.adversary.make = lambda *given: seen.append(make(*given)) or seen[-1]  # type: ignore
    for _ in range(3):
        step(x, y, index)
    moved = [(each.x_adv - each.center).abs().max().item() for each in seen]
    assert moved[0] == 0
    assert 0 < moved[1] <= EPS / 2 + 1e-12
    assert moved[2] <= EPS + 1e-12


def test_eps_warmup_smooths_labels_over_all_classes() -> None:
    """timm's smoothing, which the published code takes: a share of the mean over all classes."""
    x, y, index, start = tiny_batch()
    step = tiny_step(tiny_model(), "eps-warmup", alpha=0.0)
    model = tiny_model()
    log_p = model((x + start).clamp(0, 1)).log_softmax(1)
    losses = [
        0.9 * -row[label] + 0.1 * -row.mean() for row, label in zip(log_p, y.tolist(), strict=True)
    ]
    found = step(x, y, index, start=start)["loss"]
    torch.testing.assert_close(found.double(), sum(losses) / len(y), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("elle-a", {"adversary": "pgd"}),
        ("gat", {"adversary": "pgd", "restarts": 2}),
        ("nuat", {"attack_bn": "train"}),
        ("gat", {"regularizer": "logitalign"}),
        ("random-eps", {"attack_bn": "train", "regularizer": "advlc"}),
        ("pgd", {"regularizer": "start-and-end"}),
        ("fgsm-ep", {"follow_crops": True}),
        ("fgsm-mep", {"clip_start": True}),
    ],
)
def test_combinations_make_the_passes_that_are_counted(method: str, options: Any) -> None:
    seen, expected = counted_in_an_update(method, **options)
    assert seen == expected


@pytest.mark.parametrize(
    ("method", "options", "reason"),
    [
        ("nuat", {"adversary": "none", "start": "none"}, "identically 0"),
        ("gat", {"adversary": "none", "start": "none"}, "identically 0"),
        ("nuat", {"adversary": "pgd", "restarts": 2}, "restarts compare the loss of each sample"),
        ("fgsm-mep", {"start": "uniform"}, "this adversary begins where its own definition says"),
        ("fgsm-bp", {"start": "uniform"}, "this adversary begins where its own definition says"),
    ],
)
def test_refusals(method: str, options: dict[str, Any], reason: str) -> None:
    with pytest.raises(UserError, match=reason):
        resolve(method, options)


@pytest.mark.parametrize("method", ["nuat", "elle-a", "fgsm-mep", "fgsm-bp"])
def test_an_update_of_several_calls_is_refused_with_the_reason(method: str) -> None:
    x, y, index, _ = tiny_batch()
    step = tiny_step(tiny_model(), method, total_steps=4, steps_per_epoch=2)
    with pytest.raises(UserError, match=r"update=False is not possible with .* (a|every) call"):
        step(x, y, index, update=False)


@pytest.mark.parametrize("method", ["fgsm-mep", "fgsm-bp"])
def test_a_start_in_a_corner_needs_a_cube(method: str) -> None:
    with pytest.raises(UserError, match="take norm='linf'"):
        tiny_step(tiny_model(), method, norm="l2", total_steps=2, steps_per_epoch=1)


def test_the_regularizer_of_fgsm_pgi_is_refused_without_a_start() -> None:
    x, y, index, _ = tiny_batch()
    step = tiny_step(tiny_model(), "standard", regularizer="start-and-end")
    with pytest.raises(UserError, match="an adversary with gradient steps"):
        step(x, y, index)


@pytest.mark.parametrize("adversary", ["random-eps", "random-eps-pgd"])
def test_a_radius_per_channel_is_refused_by_random_radii(adversary: str) -> None:
    with pytest.raises(UserError, match="one eps for all channels"):
        tiny_step(tiny_model(), "pgd", adversary=adversary, eps=(0.1, 0.2, 0.1))


@pytest.mark.parametrize("momentum", [0.1, None])
def test_the_pass_at_the_start_leaves_batchnorms_statistics(momentum: float | None) -> None:
    """Those are as after the attack's pass there and the one at x', also if they are averages."""
    model, plain = tiny_model(), tiny_model()
    for net in (model, plain):
        for norm in net.modules():
            if isinstance(norm, nn.BatchNorm2d):
                norm.momentum = momentum
    data = batches(1)
    step = tiny_step(model, "fgsm-bp")
    step(*data[0])
    formulas.fgsm_bp(plain, data, fgsm_bp.INITIAL)
    own = dict(model.named_buffers())
    for name, buffer in plain.named_buffers():
        if "tracked" not in name:
            torch.testing.assert_close(own[name], buffer, rtol=1e-10, atol=1e-10)


def test_what_an_update_that_does_not_count_leaves_in_the_state() -> None:
    """A loss that is not finite: ELLE-A's history and weight stay, where no copy is put back."""
    x, y, index, _ = tiny_batch()
    step = capture(tiny_step(tiny_model(), "elle-a"))
    step(x, y, index)
    before = {name: tensor.clone() for name, tensor in step.state.items()}
    assert before["elle_history"][0] == 1
    with torch.no_grad():
        step.model.linear.bias[0] = float("nan")
    step(x, y, index)
    assert not step.healthy()
    for name, tensor in step.state.items():
        assert torch.equal(tensor, before[name]), name


def test_what_an_update_that_does_not_count_leaves_of_the_last_batch() -> None:
    x, y, index, _ = tiny_batch()
    step = capture(tiny_step(tiny_model(), "fgsm-bp"))
    step(x, y, index)
    before = step.state["buffer"].clone()
    with torch.no_grad():
        step.model.linear.bias[0] = float("nan")
    step(x, y, index)
    assert not step.healthy()
    assert torch.equal(step.state["buffer"], before)


def trained_by_halves(rank: int, world: int) -> dict[str, torch.Tensor]:
    """Weights and state of ELLE-A after some updates, in one of ``world`` processes."""
    step = tiny_step(network(), "elle-a", reg_weight=5.0, reg_sensitivity=0.0)
    share = 8 // world
    mine = slice(share * rank, share * rank + share)
    for update in range(6):
        x, y, index, _ = tiny_batch(seed=update)
        step(x[mine], y[mine], index[mine])
    return step.model.state_dict() | step.state


def halves_worker(rank: int, port: int, out: str) -> None:
    address = f"tcp://127.0.0.1:{port}"
    distributed.init_process_group("gloo", init_method=address, rank=rank, world_size=2)
    torch.save(trained_by_halves(rank, 2), f"{out}.{rank}")
    leave()


@pytest.mark.slow
def test_a_term_is_the_mean_of_all_processes(tmp_path: Path) -> None:
    """So that what is learned from it is the same in each."""
    out = str(tmp_path / "half")
    in_two_processes(halves_worker, free_port(), out)
    whole = trained_by_halves(0, 1)
    for rank in range(2):
        for name, value in torch.load(f"{out}.{rank}").items():
            torch.testing.assert_close(value, whole[name], rtol=1e-9, atol=1e-12, msg=name)
