"""A step attacks inside the threat of each call: radii, steps, masks, targets, schedules."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from tiny import EPS, sgd, tiny_batch, tiny_model, tiny_step
from tiny_capture import capture
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import fastadv
from fastadv import Phases, Ramp, Threat, UserError
from fastadv.engine import noise

MODES = ("eager", "compiled", "captured")
OFFSET = 0


def in_mode(mode: str, model: nn.Module, method: str, **options: Any) -> fastadv.Step:
    step = tiny_step(model, method, mode="compiled" if mode == "compiled" else "eager", **options)
    return capture(step) if mode == "captured" else step


def radius(values: Tensor | float) -> Tensor:
    return torch.as_tensor(values, dtype=torch.float64).view(-1, 1, 1, 1)


def pgd_by_hand(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    begin: Tensor,
    *,
    eps: Tensor | float,
    alpha: Tensor | float,
    steps: int,
    mask: Tensor | None = None,
    sign: int = 1,
) -> Tensor:
    """x_adv after sign steps along ``sign`` times the gradient, pixel by pixel as the papers
    say."""
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    x_adv = begin
    for _ in range(steps):
        x_adv = x_adv.detach().requires_grad_()
        (gradient,) = torch.autograd.grad(sign * cross_entropy(model(x_adv), y), x_adv)
        moved = x_adv.detach() + radius(alpha) * gradient.sign()
        low, high = x - radius(eps), x + radius(eps)
        x_adv = torch.minimum(torch.maximum(moved, low), high).clamp(0, 1)
        if mask is not None:
            x_adv = torch.where(mask, x_adv, x)
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    return x_adv.detach()


def train_by_hand(model: nn.Module, optimizer: Any, x_adv: Tensor, y: Tensor) -> None:
    optimizer.zero_grad()
    cross_entropy(model(x_adv), y).backward()
    optimizer.step()


def same(model: nn.Module, twin: nn.Module) -> None:
    for own, expected in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(own, expected, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("mode", MODES)
def test_radius_step_and_mask_of_each_image(mode: str) -> None:
    model, twin = tiny_model(), tiny_model()
    x, y, index, _ = tiny_batch()
    optimizer = sgd(twin)
    step = in_mode(mode, model, "pgd", start="center", steps=3)
    for round_ in range(3):
        generator = torch.Generator().manual_seed(round_)
        eps = 0.2 * torch.rand(len(x), generator=generator).double()
        alpha = 0.1 * torch.rand(len(x), generator=generator).double()
        mask = torch.rand(len(x), 1, 6, 6, generator=generator) < 0.6
        step(x, y, index, eps=eps, alpha=alpha, mask=mask)
        found = pgd_by_hand(twin, x, y, x, eps=eps, alpha=alpha, steps=3, mask=mask)
        train_by_hand(twin, optimizer, found, y)
        same(model, twin)
    # The test can fail: without the mask the weights are others.
    train_by_hand(twin, optimizer, pgd_by_hand(twin, x, y, x, eps=eps, alpha=alpha, steps=3), y)
    step(x, y, index, eps=eps, alpha=alpha, mask=mask)
    with pytest.raises(AssertionError):
        same(model, twin)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    ("eps", "alpha"),
    [
        (Ramp(0.0, EPS, epochs=2), None),
        (Phases({0: EPS / 4, 1: EPS}), None),
        (EPS, Ramp(EPS / 2, EPS / 8, epochs=3)),
    ],
)
def test_eps_and_alpha_by_epoch(mode: str, eps: Any, alpha: Any) -> None:
    model, twin = tiny_model(), tiny_model()
    x, y, index, _ = tiny_batch()
    optimizer = sgd(twin)
    changing = eps if isinstance(eps, (Ramp, Phases)) else None
    threat = Threat("linf", EPS)
    step = tiny_step(
        model,
        "pgd",
        threat=threat,
        radius=changing,
        start="center",
        alpha=alpha,
        steps=Phases({0: 1, 1: 3}),
        mode="compiled" if mode == "compiled" else "eager",
        steps_per_epoch=2,
        total_steps=6,
    )
    step = capture(step) if mode == "captured" else step
    for call in range(6):
        epoch = call / 2
        now = EPS if changing is None else changing.at(epoch)
        size = now / 4 if alpha is None else alpha.at(epoch)
        step(x, y, index)
        steps = 1 if epoch < 1 else 3
        found = pgd_by_hand(twin, x, y, x, eps=now, alpha=size, steps=steps)
        train_by_hand(twin, optimizer, found, y)
        same(model, twin)


def test_the_cost_and_the_recordings_follow_the_phase() -> None:
    from fastadv.algorithms import cost

    step = tiny_step(
        tiny_model(), "pgd", steps=Phases({0: 1, 1: 3}), steps_per_epoch=1, total_steps=4
    )
    x, y, index, _ = tiny_batch()
    assert cost.units(step.plan) == 3 * 2 + 3  # the most of any epoch
    capture(step)
    step(x, y, index)
    assert cost.units(step.plan) == 1 * 2 + 3
    step(x, y, index)
    step(x, y, index)
    assert cost.units(step.plan) == 3 * 2 + 3
    assert step.internals.passes.recorded == 2  # one for each phase


@pytest.mark.parametrize("mode", MODES)
def test_a_targeted_attack_descends_to_the_given_targets(mode: str) -> None:
    model, twin = tiny_model(), tiny_model()
    x, y, index, _ = tiny_batch()
    optimizer, targets = sgd(twin), (y + 2) % 4
    step = in_mode(
        mode, model, "pgd", threat=Threat("linf", EPS, targeted=True), start="center", steps=2
    )
    for _ in range(2):
        step(x, y, index, targets=targets)
        found = pgd_by_hand(twin, x, targets, x, eps=EPS, alpha=EPS / 4, steps=2, sign=-1)
        train_by_hand(twin, optimizer, found, y)
        same(model, twin)


def test_drawn_targets_are_other_classes_with_equal_probability() -> None:
    x = torch.rand(3000, 3, 6, 6).double()
    y = torch.arange(3000) % 4
    step = tiny_step(
        tiny_model(), "fgsm", threat=Threat("linf", EPS, targeted=True), num_samples=3000
    )
    seen = []
    own = step.plan.adversary.make

    def watched(batch: Any, context: Any) -> Any:
        seen.append(batch.targets)
        return own(batch, context)

    step.plan.adversary.make = watched
    step(x, y, torch.arange(3000))
    step(x, y, torch.arange(3000))
    first, second = seen
    assert not (first == y).any()
    away = (first - y) % 4
    counts = torch.bincount(away, minlength=4)[1:]
    assert (counts > 900).all()
    assert (counts < 1100).all()
    assert 0.2 < (first == second).double().mean() < 0.47  # drawn anew in every update


def test_a_joint_pass_attacks_the_targets_and_trains_on_the_labels() -> None:
    """FGSM with TRADES shares the pass at x between attack and loss."""
    models = tiny_model(), tiny_model()
    x, y, index, _ = tiny_batch()
    threat = Threat("linf", EPS, targeted=True)
    targets = (y + 1) % 4
    joint = tiny_step(models[0], "fgsm", objective="trades", threat=threat)
    assert joint.plan.shares_natural_forward
    joint(x, y, index, targets=targets)
    apart = tiny_step(models[1], "pgd", objective="trades", threat=threat, steps=1, alpha=EPS,
                      start="center")  # fmt: skip
    assert not apart.plan.shares_natural_forward
    apart(x, y, index, targets=targets)
    same(*models)


def test_two_views_take_the_threat_of_their_images() -> None:
    x, y, index, _ = tiny_batch()
    eps = torch.linspace(0, 0.2, len(x), dtype=torch.float64)
    mask = torch.rand(len(x), 1, 6, 6) < 0.5
    options = {"regularizer": "consistency", "start": "center", "steps": 2}
    seen = []
    step = tiny_step(tiny_model(), "pgd", **options)
    own = step.plan.adversary.make

    def watched(batch: Any, context: Any) -> Any:
        made = own(batch, context)
        seen.append(made.x_adv - batch.x)
        return made

    step.plan.adversary.make = watched
    step(x, y, index, second=x.flip(3), eps=eps, mask=mask)
    moved = seen[0].abs()
    assert (moved <= torch.cat([eps, eps]).view(-1, 1, 1, 1) + 1e-12).all()
    assert not moved[~torch.cat([mask, mask]).expand_as(moved)].any()
    assert moved.flatten(1).amax(1)[-1] > 0.05


@pytest.mark.parametrize("method", ["fgsm", "fast", "fgsm-n", "n-fgsm", "free", "pgd", "atta-3",
                                    "fgsm-plus", "apart", "trades"])  # fmt: skip
def test_no_method_moves_a_masked_pixel(method: str) -> None:
    x, y, index, _ = tiny_batch()
    mask = torch.zeros(1, 1, 6, 6, dtype=torch.bool)
    mask[..., 2:4, 2:4] = True
    blocks = {"blocks": ("conv2",)} if method == "apart" else {}
    step = tiny_step(tiny_model(), method, total_steps=4, steps_per_epoch=4, **blocks)
    seen: list[tuple[Tensor, Tensor]] = []
    logits = step.internals.net.logits

    def watched(images: Tensor, *rest: Any) -> Tensor:
        seen.append(images.detach())
        return logits(images, *rest)

    step(x, y, index, mask=mask)
    step.internals.net.logits = watched
    for _ in range(2):
        step(x, y, index, mask=mask)
    assert len(seen) > 1
    outside = ~mask.expand_as(x)
    for images in seen:
        assert torch.equal(images[outside], x[outside])
    assert any(not torch.equal(images, x) for images in seen)


def test_a_box_per_channel_is_that_of_the_normalised_images() -> None:
    """A step on normalised images equals the step on images in [0,1] of the normalising model."""
    mean, std = [0.5, 0.4, 0.3], [0.2, 0.3, 0.25]
    m, s = (torch.tensor(each).double().view(1, 3, 1, 1) for each in (mean, std))

    class Normalised(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, x: Tensor) -> Tensor:
            return self.inner((x - m) / s)

    inner, other = tiny_model(), tiny_model()
    x, y, index, _ = tiny_batch()
    options = {"start": "center", "steps": 3}
    tiny_step(inner, "pgd", threat=Threat.normalized(mean, std, eps=EPS), **options)(
        (x - m) / s, y, index
    )
    tiny_step(Normalised(other), "pgd", threat=Threat("linf", EPS), **options)(x, y, index)
    for own, expected in zip(inner.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(own, expected, rtol=1e-9, atol=1e-9)
    step = tiny_step(tiny_model(), "pgd", threat=Threat.normalized(mean, std, eps=EPS))
    with pytest.raises(UserError, match="Images must lie"):
        step(x + 5, y, index)


WRONG: list[tuple[Callable[[Tensor, Tensor], dict[str, Any]], str]] = [
    (lambda x, y: {"eps": torch.rand(3)}, "shape"),
    (lambda x, y: {"eps": 0.1}, "float tensor"),
    (lambda x, y: {"eps": -torch.ones(len(x))}, "lie in"),
    (lambda x, y: {"alpha": torch.full((len(x),), torch.nan)}, "lie in"),
    (lambda x, y: {"mask": torch.ones_like(x)}, "mask is bool"),
    (lambda x, y: {"mask": torch.ones(3, 6, 6, dtype=torch.bool)}, "mask is bool"),
    (lambda x, y: {"targets": y}, "targeted"),
]


@pytest.mark.parametrize(("given", "said"), WRONG)
def test_what_does_not_fit_is_refused(given: Any, said: str) -> None:
    x, y, index, _ = tiny_batch()
    model = tiny_model()
    before = [parameter.clone() for parameter in model.parameters()]
    with pytest.raises(UserError, match=said):
        tiny_step(model, "pgd")(x, y, index, **given(x, y))
    assert all(map(torch.equal, before, model.parameters()))


@pytest.mark.parametrize("method", ["trades", "free", "apart", "fgsm-plus"])
def test_methods_that_cannot_aim_refuse_a_targeted_threat(method: str) -> None:
    with pytest.raises(UserError, match="aim"):
        tiny_step(tiny_model(), method, threat=Threat(targeted=True), total_steps=4,
                  blocks=("conv2",))  # fmt: skip


def test_learned_step_sizes_take_no_alpha_of_an_image() -> None:
    x, y, index, _ = tiny_batch()
    step = tiny_step(tiny_model(), "fgsm-plus", total_steps=4)
    with pytest.raises(UserError, match="omit alpha"):
        step(x, y, index, alpha=torch.rand(len(x)))


def test_a_bad_radius_on_a_device_masks_the_update() -> None:
    x, y, index, _ = tiny_batch()
    model = tiny_model()
    step = capture(tiny_step(model, "pgd"))
    step(x, y, index, eps=torch.full((len(x),), 0.1))
    before = [parameter.clone() for parameter in model.parameters()]
    step(x, y, index, eps=torch.full((len(x),), -0.1))
    assert all(map(torch.equal, before, model.parameters()))
    with pytest.raises(fastadv.TrainingError, match="eps= or alpha="):
        step.check()


def test_targets_of_another_stream_than_the_start() -> None:
    assert noise.TARGETS not in range(noise.EVALUATION, 256)
    assert replace(Threat(targeted=True), targeted=False) == Threat()


def test_fastadv_step_reads_schedules_as_text() -> None:
    model = tiny_model()
    step = fastadv.step(
        model, sgd(model), "pgd", eps="0..8/255@2", alpha="2/255@0,1/255@1", steps="2@0,3@1",
        total_steps=4, steps_per_epoch=2,
    )  # fmt: skip
    x, y, _, _ = tiny_batch()
    step(x, y)
    assert float(step.threat.eps) == 0.0
    for _ in range(3):
        step(x, y)
    assert float(step.threat.eps) == pytest.approx(8 / 255 * 3 / 4)
    assert step.threat.nominal == pytest.approx(8 / 255)
    with pytest.raises(UserError, match="follows the epochs"):
        fastadv.step(model, sgd(model), "pgd", eps="0..8/255@2")(x, y)
    with pytest.raises(UserError, match="omit eps="):
        fastadv.step(model, sgd(model), "pgd", eps=0.1, threat=Threat())


def test_what_is_not_supported_is_refused() -> None:
    with pytest.raises(UserError, match="Unknown norm 'l1'"):
        Threat("l1", 1.0)
    pixels = nn.Conv2d(3, 4, 1).double()  # a class for each pixel, as in segmentation
    x, y, index, _ = tiny_batch()
    with pytest.raises(UserError, match=r"logits \(B,classes\)"):
        fastadv.step(pixels, sgd(pixels), "pgd")(x, y, index)


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_the_delta_of_free_follows_the_radius_of_each_image(norm: str) -> None:
    """It belongs to a place in the batch, where an image with another radius comes next."""
    step = tiny_step(tiny_model(), "free", norm=norm, replays=2)
    far: list[float] = []
    finish = step.internals.update.finish_update

    def watched(results: Any, ok: Any, update: bool) -> None:
        away = (results.attacked.x_adv - results.batch.x).flatten(1)
        length = away.abs().amax(1) if norm == "linf" else away.norm(dim=1)
        far.append(float((length - results.batch.threat.eps).max()))
        finish(results, ok, update)

    step.internals.update.finish_update = watched  # type: ignore[method-assign]
    x, y, index, _ = tiny_batch()
    radii = torch.linspace(0, 2 * EPS, len(x)).double()
    for given in ({"eps": radii}, {"eps": radii.flip(0)}, {}):
        step(x, y, index, **given)
    assert len(far) == 6
    assert max(far) < 1e-9


def test_the_delta_of_free_follows_a_radius_that_falls() -> None:
    step = tiny_step(
        tiny_model(), "free", replays=2, radius=Phases({0: 0.1, 1: 0.02}), steps_per_epoch=1
    )
    x, y, index, _ = tiny_batch()
    step(x, y, index)
    made: list[Any] = []
    make = step.plan.adversary.make
    step.plan.adversary.make = lambda *given: made.append(make(*given)) or made[-1]
    step(x, y, index)
    assert float((made[0].x_adv - x).abs().max()) < 0.02 + 1e-9


def test_the_tensors_of_the_steps_own_threat_are_looked_at() -> None:
    x, y, index, _ = tiny_batch()

    def call(threat: Threat, **given: Any) -> None:
        tiny_step(tiny_model(), "pgd", steps=1, threat=threat)(x, y, index, **given)

    seven = Threat("linf", torch.full((7,), 0.1).double())
    with pytest.raises(UserError, match=r"holds 7 radii, .* has 8 images: pass eps= to the call"):
        call(seven)
    call(seven, eps=torch.full((8,), 0.1).double())  # in place of the threat's
    with pytest.raises(UserError, match=r"eps and alpha of an image lie in \[0, 1\]"):
        call(Threat("linf", torch.full((8,), -0.1).double()))
    with pytest.raises(UserError, match="mask is bool and"):
        call(Threat("linf", 0.1, mask=torch.ones(4, 1, 6, 6).bool()))
