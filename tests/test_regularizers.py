"""Every regularizer: one float64 step equals its formula, eager and compiled."""

from types import SimpleNamespace

import pytest
import torch
from tiny import EPS, assert_same, climb, descend, sgd, tiny_batch, tiny_model, tiny_step
from torch.nn import functional

from fastadv import kernels
from fastadv.algorithms.contract import Outputs
from fastadv.algorithms.regularizers import gradalign, logitalign
from fastadv.algorithms.regularizers.advlc import AdvLC
from fastadv.algorithms.regularizers.gradalign import one_minus_cosine
from fastadv.errors import UserError

ALPHA, STEPS = 0.04, 2
ATTACK = {"steps": STEPS, "alpha": ALPHA}
MODES = ("eager", "compiled")


def ce(logits, y):
    return functional.cross_entropy(logits, y, reduction="none")


def kl(p, q):
    return (p * (p / q).log()).sum(1)


def js(p, q):
    middle = (p + q) / 2
    return (kl(p, middle) + kl(q, middle)) / 2


def attack(model, x, y, start, steps=STEPS):
    return climb(model, x, start, lambda z: ce(z, y).mean(), ALPHA, steps, "train")


def drawn_by(stream, index, x):
    """The uniform noise of a stream in the first update."""
    shape, number, first = tuple(x.shape[1:]), stream.number, stream.shift
    return kernels.noise_uniform(index, shape, 0, first, number, torch.float64)


def gradient(model, x, y, reduce):
    """The input gradient of the reduced cross entropy, with its own graph."""
    x = x.detach().requires_grad_()
    loss = reduce(ce(model(x), y))
    return torch.autograd.grad(loss, x, create_graph=True)[0]


def compare(mode, formula, **options):
    """One step of the method against CE(f(x')) + formula(model, x, x', y), a scalar."""
    x, y, index, start = tiny_batch()
    model, other = tiny_model(), tiny_model()
    tiny_step(model, mode=mode, **(ATTACK | options))(x, y, index, start=start)
    optimizer = sgd(other)
    x_adv = attack(other, x, y, start, options.get("steps", STEPS))
    descend(optimizer, formula(other, x, x_adv, y))
    assert_same(model, other)


def singular_values(matrix):
    return torch.linalg.eigvalsh(matrix.T @ matrix).clamp(min=0).sqrt()


DISTANCES = {
    "top-n": lambda z, w: (z - w).abs().flatten().topk(int(0.4 * z.numel())).values.sum(),
    "l1": lambda z, w: (z - w).abs().sum(),
    "squared-l2": lambda z, w: (z - w).pow(2).sum(),
    "kl": lambda z, w: kl(z.softmax(1), w.softmax(1)).sum(),
    "js": lambda z, w: js(z.softmax(1), w.softmax(1)).sum(),
    "nuclear": lambda z, w: singular_values(z - w).sum(),
}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kind", DISTANCES)
def test_advlc(kind, mode):
    def formula(model, x, x_adv, y):
        z = model(x)
        w = model(x_adv)
        return ce(w, y).mean() + 0.7 * DISTANCES[kind](z, w) / len(y)

    compare(mode, formula, regularizer="advlc", kind=kind, reg_weight=0.7, top_fraction=0.4)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("adversary", ["fgsm", "fgsm-n"])
def test_one_step_from_the_centre_forwards_it_once(adversary, mode):
    """Attack and loss share f(x~): x~ moves the running statistics once, x' once."""
    x, y, index, eta = tiny_batch()
    model, other = tiny_model(), tiny_model()
    seen = []
    model.register_forward_hook(lambda *_: seen.append(1))
    step = tiny_step(model, mode=mode, adversary=adversary, regularizer="advlc", reg_weight=0.7)
    seen.clear()
    step(x, y, index, start=eta if adversary == "fgsm-n" else None)
    center = (x + eta.clamp(-EPS, EPS)).clamp(0, 1) if adversary == "fgsm-n" else x
    center = center.clone().requires_grad_()
    optimizer = sgd(other)
    natural = other(center)
    (slope,) = torch.autograd.grad(ce(natural, y).mean(), center, retain_graph=True)
    adversarial = other((center + EPS * slope.sign()).clamp(0, 1).detach())
    change = (natural - adversarial).abs().flatten()
    largest = change.topk(int(0.1 * change.numel())).values.sum()
    descend(optimizer, ce(adversarial, y).mean() + 0.7 * largest / len(y))
    assert_same(model, other)
    if mode == "eager":
        assert len(seen) == 6  # four of them: the first call's look


@pytest.mark.parametrize(
    "apart", [{"attack_bn": "eval"}, {"weights": "awp", "warmup_epochs": 0}, {"steps": 2}]
)
def test_passes_that_differ_are_not_shared(apart):
    """With another BN mode, perturbed weights or more steps the outer pass forwards the centre."""
    adversary = {"adversary": "pgd", "start": "center"} if "steps" in apart else {}
    options = {"adversary": "fgsm-n", "regularizer": "advlc"} | adversary | apart
    x, y, index, _ = tiny_batch()
    model = tiny_model()
    step = tiny_step(model, **options)
    seen = []
    model.register_forward_hook(lambda *_: seen.append(1))
    step(x, y, index)
    attack = apart.get("steps", 1)
    weights = 1 if "weights" in apart else 0
    assert len(seen) == 4 + attack + weights + 2  # four of them: the first call's look


def test_advlc_without_weight_is_its_baseline():
    x, y, index, start = tiny_batch()
    models = [tiny_model(), tiny_model()]
    for model, options in zip(models, ({"regularizer": "advlc", "reg_weight": 0}, {}), strict=True):
        tiny_step(model, **options, **ATTACK)(x, y, index, start=start)
    for first, second in zip(models[0].parameters(), models[1].parameters(), strict=True):
        assert torch.equal(first, second)


def test_advlc_of_all_entries_is_l1():
    x, y, index, start = tiny_batch()
    models = [tiny_model(), tiny_model()]
    for model, options in zip(models, ({"kind": "l1"}, {"top_fraction": 1}), strict=True):
        tiny_step(model, regularizer="advlc", **options, **ATTACK)(x, y, index, start=start)
    assert_same(*models)


@pytest.mark.parametrize("mode", MODES)
def test_the_weight_rises_with_the_epochs(mode):
    x, y, index, start = tiny_batch()
    model, other = tiny_model(), tiny_model()
    ramp = {"reg_ramp": True, "total_steps": 3, "steps_per_epoch": 1}
    step = tiny_step(
        model, mode=mode, regularizer="advlc", kind="l1", reg_weight=0.9, **ramp, **ATTACK
    )
    optimizer = sgd(other)
    for weight in (0.3, 0.6, 0.9):
        step(x, y, index, start=start)
        x_adv = attack(other, x, y, start)
        z, w = other(x), other(x_adv)
        descend(optimizer, ce(w, y).mean() + weight * (z - w).abs().sum() / len(y))
    assert_same(model, other)


def test_a_ramp_without_the_length_of_the_run_is_refused():
    x, y, index, _ = tiny_batch()
    step = tiny_step(tiny_model(), regularizer="advlc", reg_ramp=True, **ATTACK)
    step.set_epoch(0)
    with pytest.raises(UserError, match="total_steps"):
        step(x, y, index)


@pytest.mark.parametrize("mode", MODES)
def test_igr_squares_the_gradient_of_the_mean_loss(mode):
    def formula(model, x, x_adv, y):
        x_adv = x_adv.requires_grad_()
        loss = ce(model(x_adv), y).mean()
        (found,) = torch.autograd.grad(loss, x_adv, create_graph=True)
        return loss + 300 * found.pow(2).sum()

    compare(mode, formula, regularizer="igr", reg_weight=300)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("squared", "length"), [(False, None), (True, 0.5)])
def test_cure(squared, length, mode):
    def formula(model, x, x_adv, y):
        loss = ce(model(x_adv), y).mean()
        model.eval()
        here = gradient(model, x, y, torch.sum)
        signs = here.detach().sign()
        moved = EPS * signs
        if length is not None:
            moved = torch.stack([length * rows / rows.norm() for rows in signs])
        there = gradient(model, x + moved, y, torch.sum)
        model.train()
        norms = torch.stack([rows.norm() for rows in there - here])
        return loss + 2 * (norms.pow(2) if squared else norms).mean()

    compare(
        mode,
        formula,
        regularizer="cure",
        reg_weight=2,
        cure_squared=squared,
        **({} if length is None else {"cure_length": length}),
    )


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("steps", [1, 2])
def test_gradalign_holds_the_first_gradient_constant_for_one_step(steps, mode):
    def formula(model, x, x_adv, y):
        _, _, index, _ = tiny_batch()
        drawn = drawn_by(gradalign.NEAR, index, x)
        here = gradient(model, x, y, torch.mean)
        if steps == 1:
            here = here.detach()
        loss = ce(model(x_adv), y).mean()
        near = gradient(model, x + EPS * drawn, y, torch.mean)
        cosines = [
            functional.cosine_similarity(a.flatten(), b.flatten(), dim=0)
            for a, b in zip(here, near, strict=True)
        ]
        return loss + 3 * (1 - torch.stack(cosines).mean())

    compare(mode, formula, regularizer="gradalign", reg_weight=3, steps=steps)


def test_gradalign_of_a_linear_model_is_zero_and_zero_gradients_are_left_out():
    rows = torch.randn(4, 6).double()
    lost = rows.clone()
    lost[1] = 0
    lost = lost.requires_grad_()
    assert float(one_minus_cosine(rows, 2 * rows).abs()) < 1e-12
    value = one_minus_cosine(rows, -lost)
    assert float(value.detach()) == pytest.approx(2.0)
    value.backward()
    assert lost.grad.isfinite().all()
    assert not lost.grad[1].any()
    assert float(one_minus_cosine(rows, torch.zeros_like(rows))) == 0.0


@pytest.mark.parametrize(
    ("mode", "attack_loss"), [("eager", "ce"), ("eager", "kl"), ("compiled", "ce")]
)
def test_logitalign_also_attacks_a_noisy_neighbour(attack_loss, mode):
    x, y, index, start = tiny_batch()
    model, other = tiny_model(), tiny_model()
    options = {"align_noise": 2, "reg_weight": 5, "attack_loss": attack_loss}
    tiny_step(model, mode=mode, regularizer="logitalign", attack_bn="eval", **options, **ATTACK)(
        x, y, index, start=start
    )
    drawn = drawn_by(logitalign.NOISE, index, x)
    noisy = (x + 2 * EPS * drawn).clamp(0, 1)
    examples = []
    for images in (x, noisy):
        with torch.no_grad():
            natural = other.eval()(images).softmax(1)

        def loss(z, natural=natural):
            found = ce(z, y) if attack_loss == "ce" else kl(natural, z.softmax(1))
            return found.mean()

        examples.append(climb(other, images, start, loss, ALPHA, STEPS, "eval"))
    other.train()
    z = other(examples[0])
    near = other(examples[1])
    descend(sgd(other), ce(z, y).mean() + 5 * kl(near.softmax(1), z.softmax(1)).mean())
    assert_same(model, other)


def test_the_neighbours_random_start_is_another_one():
    x, y, index, _ = tiny_batch()
    step = tiny_step(tiny_model(), regularizer="logitalign", **ATTACK)
    drawn = []
    inner = step.plan.adversary.begin
    step.plan.adversary.begin = lambda batch, restart=0: (
        drawn.append(inner(batch, restart) - batch.x) or drawn[-1] + batch.x
    )
    step(x, y, index)
    inside = [(delta.abs() < 0.99 * EPS) & (delta != 0) for delta in drawn]
    both = inside[0] & inside[1]
    assert len(drawn) == 2
    assert (drawn[0][both] - drawn[1][both]).abs().mean() > EPS / 4


@pytest.mark.parametrize("mode", MODES)
def test_consistency_of_two_views_attacked_together(mode):
    x, y, index, start = tiny_batch()
    second = tiny_batch(seed=9)[0]
    model, other = tiny_model(), tiny_model()
    step = tiny_step(
        model, mode=mode, regularizer="consistency", js_temperature=0.8, reg_weight=4, **ATTACK
    )
    step(x, y, index, start=start, second=second)
    both, labels = torch.cat([x, second]), torch.cat([y, y])
    x_adv = attack(other, both, labels, torch.cat([start, start]))
    z = other(x_adv)
    p, q = (z[:8] / 0.8).softmax(1), (z[8:] / 0.8).softmax(1)
    descend(sgd(other), ce(z, labels).mean() + 4 * js(p, q).mean())
    assert_same(model, other)


def test_consistency_needs_its_second_view_and_draws_other_noise_for_it():
    x, y, index, _ = tiny_batch()
    step = tiny_step(tiny_model(), regularizer="consistency", **ATTACK)
    with pytest.raises(UserError, match="second="):
        step(x, y, index)
    seen = []
    inner = step.plan.adversary.begin
    step.plan.adversary.begin = lambda batch, restart=0: (
        seen.append(inner(batch, restart)) or seen[-1]
    )
    step(x, y, index, second=x)
    assert (seen[0][:8] - seen[0][8:]).abs().mean() > EPS / 4


def test_consistency_is_refused_with_parts_that_store_state_per_sample():
    with pytest.raises(UserError, match="two views of a sample"):
        tiny_step(tiny_model(), regularizer="consistency", target="self-adaptive")


@pytest.mark.parametrize("regularizer", ["igr", "cure", "gradalign"])
def test_double_backward_gradients_are_unscaled(regularizer):
    """A loss scale multiplies the whole outer loss, so weights do not depend on it."""
    x, y, index, start = tiny_batch()
    models = [tiny_model(), tiny_model()]
    for model, factor in zip(models, (1.0, 1024.0), strict=True):
        step = tiny_step(model, regularizer=regularizer, reg_weight=2, **ATTACK)
        step.internals.net.loss_scale = lambda count, factor=factor: factor * count
        step.internals.updater.scaler = torch.amp.GradScaler("cpu", init_scale=factor)
        step(x, y, index, start=start)
    assert_same(*models, 1e-9)
    assert not torch.equal(models[0].conv1.weight, tiny_model().conv1.weight)


@pytest.mark.parametrize("regularizer", ["igr", "cure", "gradalign", "logitalign", "advlc"])
def test_without_weight_a_regularizer_changes_no_weight(regularizer):
    x, y, index, start = tiny_batch()
    models = [tiny_model(), tiny_model()]
    for model, options in zip(
        models, ({"regularizer": regularizer, "reg_weight": 0}, {}), strict=True
    ):
        tiny_step(model, **options, **ATTACK)(x, y, index, start=start)
    for first, second in zip(models[0].parameters(), models[1].parameters(), strict=True):
        torch.testing.assert_close(first, second, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("regularizer", ["igr", "cure", "gradalign", "advlc"])
def test_regularizers_under_autocast_stay_near_the_full_precision_step(regularizer):
    """The gradient that is differentiated again must not vanish in a half type."""
    x, y, index, start = (
        tensor.float() if tensor.is_floating_point() else tensor for tensor in tiny_batch()
    )
    gradients = []
    for dtype in (None, torch.bfloat16):
        model = tiny_model().float()
        before = model.conv1.weight.detach().clone()
        step = tiny_step(
            model,
            regularizer=regularizer,
            reg_weight=3,
            attack_bn="eval",
            optimizer=torch.optim.SGD(model.parameters(), lr=1.0),
            **ATTACK,
        )
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype is not None):
            step(x, y, index, start=start)
        gradients.append((before - model.conv1.weight.detach()).flatten())
    assert functional.cosine_similarity(*gradients, dim=0) > 0.9


def test_advlc_penalises_at_least_one_entry() -> None:
    """A fraction of a small batch that rounds to no entry is the single largest one."""
    z, w = torch.randn(2, 8, 4, generator=torch.Generator().manual_seed(0))
    batch = SimpleNamespace(y=torch.zeros(8))
    found = AdvLC(top_fraction=0.01).term(batch, None, None, Outputs(w, z, {}))
    torch.testing.assert_close(found, (z - w).abs().max() / 8)
