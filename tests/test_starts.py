"""Where an attack begins: every start against its formula, in float64."""

from __future__ import annotations

import math

import pytest
import torch
from tiny import EPS, assert_same, climb, descend, sgd, tiny_batch, tiny_model, tiny_step, twin
from tiny_staged import recorded
from torch import Tensor
from torch.nn import functional

from fastadv.algorithms.contract import Batch, Start
from fastadv.algorithms.parts import PARTS
from fastadv.errors import UserError
from fastadv.threat import Threat
from fastadv.training.training_step import Step

STARTS = sorted(PARTS["start"])
RANDOM = sorted({*STARTS} - {"center", "gradient", "stored"})
COUNT = 40


def many(margin: float = 0.0) -> tuple[Tensor, Tensor, Tensor]:
    """x, y and index of ``COUNT`` images, whose values are at least ``margin`` from 0 and 1."""
    generator = torch.Generator().manual_seed(4)
    x = torch.rand(COUNT, 3, 6, 6, generator=generator).double()
    y = torch.randint(0, 4, (COUNT,), generator=generator)
    return margin + (1 - 2 * margin) * x, y, torch.arange(COUNT)


def started(
    start: str, x: Tensor, y: Tensor, index: Tensor, threat: Threat | None = None, **options: object
) -> tuple[Step, Batch]:
    """A step of PGD with ``start`` after its first update, and the batch of the next one."""
    settings = {"reset_every": 0, "pad": 0} if start == "stored" else {}
    norm = "linf" if threat is None else threat.norm
    step = tiny_step(
        tiny_model(), "pgd", start=start, norm=norm, num_samples=COUNT, **settings, **options
    )
    step(x, y, index)
    return step, Batch(x, y, index, step.internals.offset, threat or step.threat)


def point(step: Step, batch: Batch, restart: int = 0) -> Tensor:
    assert isinstance(step.plan.start, Start)
    return step.plan.start.point(batch, restart)


def lengths(moved: Tensor) -> Tensor:
    return moved.flatten(1).norm(dim=1)


def test_bernoulli_is_a_corner_of_a_cube_clipped_to_the_box() -> None:
    x, y, index = many()
    for scale in (0.5, 1.0):
        step, batch = started("bernoulli", x, y, index, start_scale=scale)
        begun, reach = point(step, batch), scale * EPS
        up, down = (x + reach).clamp(max=1), (x - reach).clamp(min=0)
        is_up, is_down = torch.isclose(begun, up), torch.isclose(begun, down)
        assert (is_up | is_down).all()
        inside = (x > reach) & (x < 1 - reach)
        torch.testing.assert_close(
            (begun - x)[inside].abs(), torch.full_like(x[inside], reach), rtol=0, atol=1e-12
        )
        share = is_up[inside].double().mean()
        deviation = 0.5 / math.sqrt(int(inside.sum()))
        assert abs(share - 0.5) < 4 * deviation
    assert PARTS["start"]["bernoulli"]().start_scale == 0.5  # NuAT's published code


def test_bernoulli_of_an_l2_ball_lies_in_it() -> None:
    x, y, index = many(0.3)
    step, batch = started("bernoulli", x, y, index, Threat("l2", EPS))
    moved = point(step, batch) - x
    torch.testing.assert_close(lengths(moved), torch.full((COUNT,), EPS).double())
    # A corner of the cube: all elements are equally long.
    torch.testing.assert_close(moved.abs(), torch.full_like(x, EPS / math.sqrt(x[0].numel())))
    assert 0.4 < (moved > 0).double().mean() < 0.6


def test_uniform_is_uniform_in_the_cube_and_clipped() -> None:
    x, y, index = many()
    moved = {}
    for start in ("uniform", "uniform-unclipped"):
        step, batch = started(start, x, y, index)
        moved[start] = point(step, batch) - x
    free = moved["uniform-unclipped"]
    assert free.abs().max() <= EPS
    # The moments of U(-eps, eps): 0, eps^2/3, eps^4/5.
    assert abs(free.mean()) < 4 * EPS / math.sqrt(3 * free.numel())
    assert free.square().mean() == pytest.approx(EPS**2 / 3, rel=0.05)
    assert free.pow(4).mean() == pytest.approx(EPS**4 / 5, rel=0.05)
    assert ((x + free < 0) | (x + free > 1)).any()
    torch.testing.assert_close(x + moved["uniform"], (x + free).clamp(0, 1))


def test_uniform_of_an_l2_ball_has_a_uniform_radius() -> None:
    x, y, index = many(0.3)
    step, batch = started("uniform", x, y, index, Threat("l2", EPS))
    radius = torch.cat([lengths(point(step, batch, restart) - x) for restart in range(20)]) / EPS
    assert radius.max() <= 1 + 1e-9
    deviation = math.sqrt(1 / 12 / len(radius))
    assert abs(radius.mean() - 0.5) < 4 * deviation
    assert radius.var() == pytest.approx(1 / 12, rel=0.15)
    # The published code of the memorization paper begins near x instead.
    step, batch = started("uniform-unclipped", x, y, index, Threat("l2", EPS))
    assert (point(step, batch) - x).std() == pytest.approx(0.001, rel=0.05)


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_gaussian_is_0_001_of_a_standard_normal(norm: str) -> None:
    x, y, index = many()
    x[:, 0] = 0.0  # on the edge of the box, which does not clip the start
    step, batch = started("gaussian", x, y, index, Threat(norm, EPS))
    moved = (point(step, batch) - x) / 0.001
    count = moved.numel()
    assert abs(moved.mean()) < 4 / math.sqrt(count)
    assert moved.std() == pytest.approx(1, abs=4 / math.sqrt(2 * count))
    assert moved.pow(4).mean() == pytest.approx(3, rel=0.15)
    assert 0.4 < (moved[:, 0] < 0).double().mean() < 0.6


def test_from_the_center_is_from_the_image() -> None:
    x, y, index, _ = tiny_batch()
    models = [tiny_model(), tiny_model()]
    tiny_step(models[0], "pgd", steps=3, start="center")(x, y, index)
    tiny_step(models[1], "pgd", steps=3)(x, y, index, start=torch.zeros_like(x))
    assert_same(*models, tolerance=0)
    with pytest.raises(UserError, match="no gradient"):
        tiny_step(tiny_model(), "trades", start="center")


def test_stored_continues_where_the_last_attack_on_the_sample_ended() -> None:
    """PGD from a store, by hand: the end of one attack is the start of the next, whole images."""
    x, y, index, _ = tiny_batch()
    y_of, alpha, steps = {int(i): int(label) for i, label in zip(index, y, strict=True)}, 0.03, 2
    model = tiny_model()
    by_hand = twin(model)
    options = {"alpha": alpha, "steps": steps, "reset_every": 0, "pad": 0}
    step = tiny_step(model, "pgd", start="stored", optimizer=sgd(model), **options)
    made = recorded(step)
    optimizer = sgd(by_hand)
    ended: dict[int, Tensor] = {}
    for update in range(3):
        order = torch.randperm(len(x), generator=torch.Generator().manual_seed(update))[:6]
        images, rows = x[order], index[order]
        labels = torch.tensor([y_of[int(i)] for i in rows])
        step(images, labels, rows)
        first = [ended.get(int(i)) for i in rows]
        for place, kept in enumerate(first):
            if kept is None:  # a new sample: the initial store is 0.001 N(0,1)
                drawn = made[-1].start[place] - images[place]
                assert 0.0007 < drawn.std() < 0.0013
                first[place] = drawn
        start = torch.stack([each for each in first if each is not None])
        torch.testing.assert_close(made[-1].start, images + start)

        def loss(z: Tensor, labels: Tensor = labels) -> Tensor:
            return functional.cross_entropy(z, labels)

        x_adv = by_book(by_hand, images, start, loss, alpha, steps)
        descend(optimizer, functional.cross_entropy(by_hand(x_adv), labels))
        ended |= {int(i): x_adv[place] - images[place] for place, i in enumerate(rows)}
        for i, kept in ended.items():
            torch.testing.assert_close(step.state["perturbations"][i], kept)
    assert_same(model, by_hand)


def by_book(
    model: torch.nn.Module, x: Tensor, start: Tensor, loss: object, alpha: float, steps: int
) -> Tensor:
    """``climb`` from a start that is not clipped before the first step."""
    x_adv = (x + start).detach().requires_grad_()
    (gradient,) = torch.autograd.grad(loss(model(x_adv)), x_adv)  # type: ignore[operator]
    moved = x_adv.detach() + alpha * gradient.sign()
    first = (x + (moved - x).clamp(-EPS, EPS)).clamp(0, 1)
    return climb(model, x, first - x, loss, alpha, steps - 1, "train")  # type: ignore[arg-type]


@pytest.mark.parametrize("start", RANDOM)
def test_a_random_start_is_new_in_every_update_and_for_every_sample(start: str) -> None:
    x, y, index = many(0.3)
    step, batch = started(start, x, y, index)
    first = point(step, batch) - x
    assert torch.equal(point(step, batch) - x, first)
    turned = batch._replace(x=x.flip(0), index=index.flip(0))
    torch.testing.assert_close((point(step, turned) - x.flip(0)).flip(0), first)
    later = batch._replace(offset=batch.offset + 1)
    for other in (point(step, later) - x, point(step, batch, 1) - x, first.roll(1, 0)):
        assert abs(torch.corrcoef(torch.stack([first.flatten(), other.flatten()]))[0, 1]) < 0.1


@pytest.mark.parametrize("start", STARTS)
def test_every_restart_begins_elsewhere_inside_the_ball(start: str) -> None:
    x, y, index = many(0.3)
    step, batch = started(start, x, y, index)
    begun = [point(step, batch, restart) - x for restart in range(3)]
    for first, second in ((0, 1), (0, 2), (1, 2)):
        assert (begun[first] != begun[second]).flatten(1).any(1).all()
    for moved in begun:
        assert moved.abs().max() <= EPS + 1e-9


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("start", STARTS)
def test_no_start_moves_a_pixel_that_may_not_move(start: str, norm: str) -> None:
    x, y, index = many()
    mask = torch.rand(COUNT, 1, 6, 6, generator=torch.Generator().manual_seed(1)) < 0.5
    step, batch = started(start, x, y, index, Threat(norm, EPS, mask=mask))
    for restart in (0, 1):
        begun = point(step, batch, restart)
        still = ~mask.expand_as(x)
        assert torch.equal(begun[still], x[still])
        assert (begun != x).any() == (start != "center" or restart > 0)


@pytest.mark.parametrize("adversary", ["fgsm", "fast"])
@pytest.mark.parametrize("start", STARTS)
def test_an_attack_of_one_step_begins_there_too(start: str, adversary: str) -> None:
    x, y, index, _ = tiny_batch()
    more = {"reset_every": 0, "pad": 0} if start == "stored" else {}
    step = tiny_step(tiny_model(), adversary, start=start, attack_bn="eval", **more)
    model = twin(step.model).eval()
    made = recorded(step)
    step(x, y, index)
    begun = made[0].start
    assert torch.equal(begun, x) == (start == "center")
    z = (begun.clamp(0, 1) if start == "gradient" else begun).detach().requires_grad_()
    (gradient,) = torch.autograd.grad(functional.cross_entropy(model(z), y), z)
    alpha = EPS if adversary == "fgsm" else 1.25 * EPS
    moved = begun + alpha * gradient.sign() - x
    torch.testing.assert_close(made[0].x_adv, (x + moved.clamp(-EPS, EPS)).clamp(0, 1))


@pytest.mark.parametrize("start", STARTS)
def test_a_given_start_comes_before_the_part(start: str) -> None:
    x, y, index, given = tiny_batch()
    models = [tiny_model(), tiny_model()]
    more = {"reset_every": 0, "pad": 0} if start == "stored" else {}
    tiny_step(models[0], "pgd", steps=2, start=start, **more)(x, y, index, start=given)
    tiny_step(models[1], "pgd", steps=2)(x, y, index, start=given)
    assert_same(*models, tolerance=0)


@pytest.mark.parametrize("start", ["bernoulli", "center", "gradient", "stored"])
def test_a_compiled_step_begins_at_the_same_point(start: str) -> None:
    x, y, index, _ = tiny_batch()
    more = {"reset_every": 0, "pad": 0} if start == "stored" else {}
    models = [tiny_model(), tiny_model()]
    for model, mode in zip(models, ("eager", "compiled"), strict=True):
        step = tiny_step(model, "pgd", steps=2, start=start, mode=mode, **more)
        for _ in range(3):
            step(x, y, index)
    assert_same(*models)


def given_noise(x: Tensor) -> Tensor:
    """A start of the caller, which is the noise of FGSM-N and N-FGSM."""
    drawn = torch.rand(x.shape, generator=torch.Generator().manual_seed(8)).double()
    return EPS * (2 * drawn - 1)


@pytest.mark.parametrize("start", STARTS)
def test_fgsm_n_begins_in_the_ball_around_its_noisy_image(start: str) -> None:
    x, y, index, _ = tiny_batch()
    more = {"reset_every": 0, "pad": 0} if start == "stored" else {}
    step = tiny_step(tiny_model(), "fgsm-n", start=start, attack_bn="eval", **more)
    model, made = twin(step.model).eval(), recorded(step)
    noise = given_noise(x)
    step(x, y, index, start=noise)
    noisy, begun = (x + noise).clamp(0, 1), made[0].start
    torch.testing.assert_close(made[0].center, noisy)
    assert (begun - noisy).abs().max() <= EPS + 1e-9
    assert torch.equal(begun, noisy) == (start == "center")
    z = (begun.clamp(0, 1) if start == "gradient" else begun).detach().requires_grad_()
    (gradient,) = torch.autograd.grad(functional.cross_entropy(model(z), y), z)
    moved = (begun + EPS * gradient.sign() - noisy).clamp(-EPS, EPS)
    torch.testing.assert_close(made[0].x_adv, (noisy + moved).clamp(0, 1))
    if start == "stored":
        kept = step.state["perturbations"][index]
        torch.testing.assert_close(kept, made[0].x_adv - noisy)


@pytest.mark.parametrize("start", STARTS)
def test_n_fgsm_takes_an_unprojected_step_from_a_chosen_start(start: str) -> None:
    x, y, index, _ = tiny_batch()
    more = {"reset_every": 0, "pad": 0} if start == "stored" else {}
    step = tiny_step(tiny_model(), "n-fgsm", start=start, attack_bn="eval", **more)
    model, made = twin(step.model).eval(), recorded(step)
    step(x, y, index)
    begun = made[0].start
    assert (begun - x).abs().max() <= EPS + 1e-9
    z = (begun.clamp(0, 1) if start == "gradient" else begun).detach().requires_grad_()
    (gradient,) = torch.autograd.grad(functional.cross_entropy(model(z), y), z)
    torch.testing.assert_close(made[0].x_adv, (begun + EPS * gradient.sign()).clamp(0, 1))
    assert ((made[0].x_adv - x).abs() > 1.01 * EPS).any() == (start != "center")


def test_fgsm_n_from_its_centre_is_fgsm_n_also_against_the_kl() -> None:
    x, y, index, _ = tiny_batch()
    for options in ({}, {"regularizer": "advlc"}, {"attack_loss": "kl"}):
        models = [tiny_model(), tiny_model()]
        tiny_step(models[0], "fgsm-n", start="center", **options)(x, y, index)
        tiny_step(models[1], "fgsm-n", **options)(x, y, index)
        assert_same(*models, tolerance=0)
