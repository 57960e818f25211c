"""Every target: one and three float64 steps equal their formula, eager and compiled."""

import copy

import pytest
import torch
from tiny import assert_same, climb, descend, sgd, tiny_batch, tiny_model, tiny_step
from torch.nn import functional

from fastadv.algorithms.targets.distillation import Distillation
from fastadv.algorithms.targets.label_smoothing import LabelSmoothing
from fastadv.algorithms.targets.self_adaptive import SelfAdaptive
from fastadv.algorithms.targets.temporal_ensembling import TemporalEnsembling, ramp
from fastadv.errors import UserError

ALPHA, STEPS = 0.04, 2
ATTACK = {"steps": STEPS, "alpha": ALPHA}
MODES = ("eager", "compiled")


def ce(logits, y):
    return functional.cross_entropy(logits, y, reduction="none")


def kl(logits_p, logits_q):
    p = torch.softmax(logits_p, 1)
    return (p * (p / torch.softmax(logits_q, 1)).log()).sum(1)


def attack(model, x, y, start, bn="train"):
    return climb(model, x, start, lambda z: ce(z, y).mean(), ALPHA, STEPS, bn)


@pytest.mark.parametrize("mode", MODES)
def test_label_smoothing_fits_soft_labels_and_attacks_hard_ones(mode):
    x, y, index, start = tiny_batch()
    model, other = tiny_model(), tiny_model()
    step = tiny_step(model, mode=mode, target="label-smoothing", smoothing=0.3, **ATTACK)
    step(x, y, index, start=start)
    soft = torch.full((len(y), 4), 0.3 / 3, dtype=torch.float64)
    soft[torch.arange(len(y)), y] = 0.7
    torch.testing.assert_close(soft.sum(1), torch.ones(len(y)).double())
    x_adv = attack(other, x, y, start)
    optimizer = sgd(other)
    descend(optimizer, -(soft * other(x_adv).log_softmax(1)).sum(1).mean())
    assert_same(model, other)


@pytest.mark.parametrize("attack_loss", ["ce", "fit"])
def test_label_smoothing_over_all_classes_is_torchs_own(attack_loss):
    x, y, index, start = tiny_batch()
    model, other = tiny_model(), tiny_model()
    options = {"target": "label-smoothing", "smoothing": 0.3, "smooth_over": "all"}
    step = tiny_step(model, attack_loss=attack_loss, **options, **ATTACK)
    optimizer = sgd(other)
    for seed in range(3):
        x, y, index, start = tiny_batch(seed=seed)
        step(x, y, index, start=start)
        smoothed = torch.nn.CrossEntropyLoss(label_smoothing=0.3)

        def attacked(z, y=y, smoothed=smoothed):
            return smoothed(z, y) if attack_loss == "fit" else functional.cross_entropy(z, y)

        x_adv = climb(other, x, start, attacked, ALPHA, STEPS, "train")
        descend(optimizer, smoothed(other(x_adv), y))
    assert_same(model, other)


def test_no_smoothing_is_the_hard_label():
    x, y, index, start = tiny_batch()
    models = [tiny_model(), tiny_model()]
    for model, options in zip(
        models, ({"target": "label-smoothing", "smoothing": 0}, {}), strict=True
    ):
        tiny_step(model, **options, **ATTACK)(x, y, index, start=start)
    assert_same(*models)


def te_options(**options):
    return {
        "target": "temporal-ensembling",
        "te_weight": 7.0,
        "te_momentum": 0.8,
        "te_start": 1,
        "te_end": 3,
        "steps_per_epoch": 1,
        **ATTACK,
        **options,
    }


def te_weight(epoch):
    """7 exp(-5 (1 - t)^2), t from 0 at epoch 1 to 1 at epoch 3."""
    t = torch.tensor((epoch - 1) / 2).double().clamp(max=1)
    return 0.0 if epoch < 1 else 7.0 * torch.exp(-5 * (1 - t) ** 2)


@pytest.mark.parametrize(
    ("mode", "te_on"), [("eager", "code"), ("eager", "paper"), ("compiled", "code")]
)
@pytest.mark.parametrize("method", ["pgd", "trades"])
def test_temporal_ensembling(method, te_on, mode):
    x, y, index, start = tiny_batch()
    model, other = tiny_model(), tiny_model()
    bn = "eval" if method == "trades" else "train"
    step = tiny_step(model, method, mode=mode, **te_options(te_on=te_on))
    optimizer = sgd(other)
    average = torch.zeros(20, 4).double()
    for epoch in range(4):
        step(x, y, index, start=start)
        weight = te_weight(epoch)
        with torch.no_grad():
            natural = other.eval()(x)
        other.train()
        target = torch.full((len(x), 4), 0.25).double()
        if epoch >= 1:
            average[index] = 0.8 * average[index] + 0.2 * natural.softmax(1)
            target = average[index] / average[index].sum(1, keepdim=True)

        def far(z, target=target, weight=weight):
            return weight * (z.softmax(1) - target).pow(2).sum(1)

        if method == "pgd":
            x_adv = climb(
                other, x, start, lambda z, far=far: (ce(z, y) + far(z)).mean(), ALPHA, STEPS, bn
            )
            z_adv = other(x_adv)
            loss = ce(z_adv, y) + far(z_adv)
        else:
            x_adv = climb(
                other,
                x,
                start,
                lambda z, far=far, natural=natural: (6 * kl(natural, z) + far(z)).mean(),
                ALPHA,
                STEPS,
                bn,
            )
            z, z_adv = other(x), other(x_adv)
            loss = ce(z, y) + 6 * kl(z, z_adv) + far(z if te_on == "code" else z_adv)
        descend(optimizer, loss.mean())
    assert_same(model, other)
    torch.testing.assert_close(step.state["predictions"], average)


def test_the_normalised_prediction_is_the_bias_corrected_average():
    x, y, index, start = tiny_batch()
    model = tiny_model()
    step = tiny_step(model, **te_options(te_start=0, te_end=0, steps_per_epoch=None))
    seen = []
    for _ in range(3):
        with torch.no_grad():
            seen.append(model.eval()(x).softmax(1))
        model.train()
        step(x, y, index, start=start)
    state = step.state["predictions"][index]
    average = sum(0.8 ** (2 - k) * 0.2 * p for k, p in enumerate(seen)) / (1 - 0.8**3)
    torch.testing.assert_close(state / state.sum(1, keepdim=True), average)
    assert not step.state["predictions"][[i for i in range(20) if i not in index]].any()


def test_before_its_start_temporal_ensembling_costs_nothing():
    x, y, index, start = tiny_batch()
    models = [tiny_model(), tiny_model()]
    passes = []
    models[0].register_forward_hook(lambda *_: passes.append(1))
    step = tiny_step(models[0], **te_options())
    step(x, y, index, start=start)
    assert len(passes) == 4 + STEPS + 1  # four of them: the first call's look
    tiny_step(models[1], **ATTACK)(x, y, index, start=start)
    assert_same(*models, 0.0)
    assert not step.state["predictions"].any()
    step(x, y, index, start=start)
    assert len(passes) == 7 + STEPS + 2


def test_the_ramp_is_the_published_one():
    for epoch, value in ((89, 0.0), (90, 0.0067), (100, 0.031), (110, 0.108), (120, 0.287)):
        assert ramp(epoch, 90, 150) == pytest.approx(value, abs=1e-3)
    for epoch, value in ((130, 0.574), (140, 0.870), (150, 1.0), (199, 1.0)):
        assert ramp(epoch, 90, 150) == pytest.approx(value, abs=1e-3)


def test_the_default_phases_are_the_published_epochs_of_200():
    x, y, index, _ = tiny_batch()
    step = tiny_step(
        tiny_model(), target="temporal-ensembling", total_steps=200, steps_per_epoch=1, **ATTACK
    )
    for calls, active in ((88, False), (89, True)):
        step.internals.clock.calls = calls
        step(x, y, index)
        assert step.plan.target.active is active


def test_a_batch_that_is_not_finite_is_not_stored():
    x, y, index, start = tiny_batch()
    model = tiny_model()
    for target, name, extra in (
        ("temporal-ensembling", "predictions", {"te_start": 0, "te_end": 0}),
        ("self-adaptive", "targets", {"sat_start": 0}),
    ):
        step = tiny_step(model, target=target, **extra, **ATTACK)
        step(x, y, index, start=start)
        before = step.state[name].clone()
        bad = x.clone()
        bad[0, 0, 0, 0] = float("nan")
        step(bad, y, index, start=start)
        assert torch.equal(step.state[name], before)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("method", ["pgd", "trades", "trades-sat"])
def test_self_adaptive_labels_move_before_they_are_fitted(method, mode):
    x, y, index, start = tiny_batch()
    model, other = tiny_model(), tiny_model()
    step = tiny_step(
        model,
        method,
        mode=mode,
        target="self-adaptive",
        sat_momentum=0.7,
        sat_start=1,
        steps_per_epoch=1,
        **ATTACK,
    )
    optimizer = sgd(other)
    targets = functional.one_hot(y, 4).double()
    for epoch in range(4):
        step(x, y, index, start=start)
        natural = other.eval()(x).detach()
        other.train()
        if method != "pgd":
            x_adv = climb(
                other, x, start, lambda z, n=natural: kl(n, z).mean(), ALPHA, STEPS, "eval"
            )
            z = other(x)
            rest = 6 * kl(z, other(x_adv))
        else:
            z = other(attack(other, x, y, start))
            rest = 0.0
        fitted = ce(z, y)
        if epoch >= 1:
            targets = 0.7 * targets + 0.3 * z.detach().softmax(1)
            weights = targets.max(1).values
            weights = weights / weights.mean()
            fitted = -weights * (targets * z.log_softmax(1)).sum(1)
        descend(optimizer, (fitted + rest).mean())
    assert_same(model, other)
    assert model.bn1.num_batches_tracked == other.bn1.num_batches_tracked
    torch.testing.assert_close(step.state["targets"][index], targets)


def test_labels_that_never_move_are_the_hard_labels():
    x, y, index, start = tiny_batch()
    models = [tiny_model(), tiny_model()]
    sat = {"target": "self-adaptive", "sat_momentum": 1.0, "sat_start": 0}
    for model, options in zip(models, (sat, {}), strict=True):
        tiny_step(model, **options, **ATTACK)(x, y, index, start=start)
    assert_same(*models)


@pytest.mark.parametrize("mode", MODES)
def test_distillation_from_two_teachers_that_see_the_students_x_adv(mode):
    x, y, index, start = tiny_batch()
    model, other = tiny_model(), tiny_model()
    teachers = [tiny_model(5), tiny_model(6)]
    step = tiny_step(
        model,
        mode=mode,
        target="distillation",
        teachers=teachers,
        kd_weights="0.5, 0.2,0.3",
        temperature=3,
        **ATTACK,
    )
    before = [{k: v.clone() for k, v in t.state_dict().items()} for t in teachers]
    step(x, y, index, start=start)
    x_adv = attack(other, x, y, start)
    z = other(x_adv)
    loss = 0.5 * ce(z, y)
    for teacher, weight, kept in zip(teachers, (0.2, 0.3), before, strict=True):
        soft = (teacher(x_adv) / 3).softmax(1)
        # T^2 cross entropy with the teacher, which is KL plus the teacher's entropy.
        entropy = -(soft * soft.log()).sum(1)
        divergence = (soft * (soft.log() - (z / 3).log_softmax(1))).sum(1)
        loss = loss + weight * 9 * (divergence + entropy)
        for name, tensor in teacher.state_dict().items():
            assert torch.equal(tensor, kept[name])
    descend(sgd(other), loss.mean())
    assert_same(model, other)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("objective", ["trades", "clean-mixed", "clean-subtracted"])
def test_teachers_predict_for_the_image_that_is_fitted(objective, mode):
    """f(x) is fitted to what the teacher says of x, f(x') to what it says of x'."""
    x, y, index, start = tiny_batch()
    teacher = tiny_model(5).eval()
    options = {"target": "distillation", "teachers": [tiny_model(5)], "kd_weights": (0.4, 0.6)}
    options |= {"objective": objective, "temperature": 3, "steps": 2, "alpha": 0.04}
    if objective == "clean-mixed":
        options |= {"mix_start": 0.3, "mix_end": 0.3, "mix_epochs": 1}
    model, other = tiny_model(), tiny_model()
    tiny_step(model, mode=mode, **options)(x, y, index, start=start)

    def fit(logits, images):
        soft = (teacher(images) / 3).softmax(1).detach()
        distilled = -9 * (soft * (logits / 3).log_softmax(1)).sum(1)
        return 0.4 * ce(logits, y) + 0.6 * distilled

    optimizer = sgd(other)
    x_adv = climb(other, x, start, lambda z: ce(z, y).mean(), 0.04, 2, "train")
    natural, adversarial = other(x), other(x_adv)
    if objective == "trades":
        with torch.no_grad():
            other(x)
        p, q = natural.softmax(1), adversarial.softmax(1)
        losses = fit(natural, x) + 6 * (p * (p / q).log()).sum(1)
    elif objective == "clean-mixed":
        losses = 0.7 * fit(natural, x) + 0.3 * fit(adversarial, x_adv)
    else:
        losses = fit(adversarial, x_adv) - 0.5 * fit(natural, x)
    descend(optimizer, losses.mean())
    assert_same(model, other)


def test_an_attack_on_the_distilled_loss_is_refused():
    x, y, index, _ = tiny_batch()
    options = {"target": "distillation", "teachers": [tiny_model(5)], "kd_weights": (1, 1)}
    step = tiny_step(tiny_model(), attack_loss="fit", **options)
    with pytest.raises(UserError, match="take another attack_loss, such as ce"):
        step(x, y, index)


def test_distillation_with_all_weight_on_the_label_is_adversarial_training():
    x, y, index, start = tiny_batch()
    models = [tiny_model(), tiny_model()]
    taught = {"target": "distillation", "teachers": [tiny_model(3)], "kd_weights": (1, 0)}
    for model, options in zip(models, (taught, {}), strict=True):
        tiny_step(model, **options, **ATTACK)(x, y, index, start=start)
    assert_same(*models)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({}, "needs its teachers"),
        ({"teachers": "a,b", "kd_weights": "1,2"}, "must hold 3 numbers"),
        ({"teachers": "runs/a", "kd_weights": "1,1"}, r"fastadv\.load_model\('runs/a'\)"),
    ],
)
def test_teachers_that_cannot_be_used_are_refused(options, sentence, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    x, y, index, _ = tiny_batch()
    with pytest.raises(UserError, match=sentence):
        tiny_step(tiny_model(), target="distillation", **options)(x, y, index)


def test_a_target_with_state_per_sample_requires_num_samples():
    x, y, index, _ = tiny_batch()
    step = tiny_step(tiny_model(), target="self-adaptive", sat_start=0, num_samples=None)
    with pytest.raises(UserError, match="num_samples"):
        step(x, y, index)
    with pytest.raises(UserError, match="index="):
        tiny_step(tiny_model(), target="self-adaptive", sat_start=0)(x, y)


def test_predictions_survive_save_and_load():
    x, y, index, start = tiny_batch()
    model = tiny_model()
    step = tiny_step(model, **te_options(te_start=0, te_end=0))
    step(x, y, index, start=start)
    other = tiny_model()
    other.load_state_dict(model.state_dict())
    resumed = tiny_step(other, **te_options(te_start=0, te_end=0))
    resumed.load_state_dict(copy.deepcopy(step.state_dict()))
    for one in (step, resumed):
        one.optimizer.state.clear()
        one(x, y, index, start=start)
    assert_same(model, other, 0.0)
    assert torch.equal(step.state["predictions"], resumed.state["predictions"])


def test_teachers_are_left_in_eval_mode_and_frozen() -> None:
    x, y, index, start = tiny_batch()
    teachers = [tiny_model(5), tiny_model(6)]
    step = tiny_step(tiny_model(), target="distillation", teachers=teachers, steps=1)
    step(x, y, index, start=start)
    for teacher in teachers:
        assert not any(module.training for module in teacher.modules())
        assert not any(parameter.requires_grad for parameter in teacher.parameters())


def test_a_float32_teacher_teaches_a_float64_student() -> None:
    x, y, index, start = tiny_batch()
    loaded = tiny_model(5).float()
    taught = {"target": "distillation", "teachers": [loaded], "kd_weights": (0.5, 0.5)}
    step = tiny_step(tiny_model(), steps=1, **taught)
    assert step(x, y, index, start=start)["loss"].isfinite()
    assert loaded.conv1.weight.dtype == torch.float64


def test_the_usual_weights_of_distillation_are_the_published_ones() -> None:
    """VITA-Group/Alleviate-Robust-Overfitting: the label, the standard and the robust teacher."""
    assert Distillation().kd_weights == (0.3, 0.1, 0.6)


@pytest.mark.parametrize(
    ("part", "options", "sentence"),
    [
        (LabelSmoothing, {"smoothing": 1.0}, "smoothing must"),
        (LabelSmoothing, {"smoothing": -0.1}, "smoothing must"),
        (SelfAdaptive, {"sat_momentum": 1.1}, "sat_momentum must"),
        (TemporalEnsembling, {"te_momentum": 1.0}, "te_momentum must"),
        (Distillation, {"temperature": 0.0}, "temperature must"),
    ],
)
def test_meaningless_strengths_are_refused(part, options, sentence) -> None:
    with pytest.raises(UserError, match=sentence):
        part(**options)
