"""Labels that are not classes: soft labels, several per image, one logit, regression, and losses of
the user's own."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from tiny import CLASSES, EPS, assert_same, climb, descend, sgd, tiny_batch, tiny_model, tiny_step
from tiny_capture import DeviceNetwork, capture
from torch import Tensor, nn
from torch.nn import functional

import fastadv
from fastadv import kernels
from fastadv.algorithms.regularizers.gradalign import NEAR
from fastadv.errors import TrainingError, UserError

MODES = ["eager", "compiled", "captured"]
ALPHA = EPS / 4
x, y, index, start = tiny_batch()


def step_of(model: nn.Module, method: str = "pgd", mode: str = "eager", **options: Any) -> Any:
    if method == "pgd":
        options = {"steps": 3, "alpha": ALPHA, **options}
    options = {"total_steps": 8, "steps_per_epoch": 2, **options}
    if mode == "captured":
        return capture(tiny_step(model, method, **options))
    return tiny_step(model, method, mode=mode, **options)


def by_hand(model: nn.Module, loss: Callable[[Tensor], Tensor], updates: int = 2) -> nn.Module:
    """PGD-3 on the mean of ``loss(logits)`` (B,)."""
    optimizer = sgd(model)
    for _ in range(updates):
        x_adv = climb(model, x, start, lambda z: loss(z).mean(), ALPHA, 3, "train")
        descend(optimizer, loss(model(x_adv)).mean())
    return model


def mixup(seed: int = 3) -> Tensor:
    """Soft labels (8,4): each image's class with one other."""
    share = torch.rand(len(y), 1, generator=torch.Generator().manual_seed(seed)).double()
    one_hot = torch.eye(CLASSES, dtype=torch.float64)[y]
    return share * one_hot + (1 - share) * one_hot.flip(0)


def entropy(soft: Tensor) -> Callable[[Tensor], Tensor]:
    return lambda z: -(soft * (z - z.logsumexp(1, keepdim=True))).sum(1)


# -- soft labels ----------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", MODES)
def test_mixed_labels_are_fitted_and_attacked(mode: str) -> None:
    model, soft = tiny_model(), mixup()
    step = step_of(model, mode=mode)
    for _ in range(2):
        metrics = step(x, soft, start=start)
    assert_same(model, by_hand(tiny_model(), entropy(soft)))
    assert metrics["loss"].dtype == torch.float64


def test_mixed_images_train_as_in_a_loop_by_hand() -> None:
    """Mixup of images and labels, TRADES: soft cross entropy at x and a KL."""
    mixed, soft = 0.7 * x + 0.3 * x.flip(0), torch.eye(CLASSES, dtype=torch.float64)[y]
    soft = 0.7 * soft + 0.3 * soft.flip(0)
    model, own = tiny_model(), tiny_model()
    step_of(model, "trades", steps=1, alpha=ALPHA)(mixed, soft, start=start)
    own.eval()
    with torch.no_grad():
        p = own(mixed).softmax(1)
    x_adv = climb(
        own, mixed, start, lambda z: -(p * z.log_softmax(1)).sum(1).mean(), ALPHA, 1, "eval"
    )
    natural, adversarial = own(mixed), own(x_adv)
    log_p, log_q = natural.log_softmax(1), adversarial.log_softmax(1)
    divergence = (log_p.exp() * (log_p - log_q)).sum(1)
    descend(sgd(own), (entropy(soft)(natural) + 6 * divergence).mean())
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(
            parameter, own.get_parameter(name), rtol=1e-10, atol=1e-10, msg=name
        )


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("trades", {"steps": 2}),
        ("awp", {"steps": 2}),
        ("rwp", {"steps": 2, "weight_steps": 2, "c_min": 1.5}),
        ("pgd", {"regularizer": "igr"}),
        ("pgd", {"regularizer": "cure"}),
        ("pgd", {"regularizer": "gradalign"}),
        ("pgd", {"regularizer": "advlc"}),
        ("pgd", {"regularizer": "consistency"}),
        ("pgd", {"objective": "clean-subtracted"}),
        ("pgd", {"objective": "clean-mixed"}),
        ("pgd", {"target": "label-smoothing"}),
        ("pgd", {"target": "temporal-ensembling", "te_start": 0, "te_end": 1}),
        ("pgd", {"restarts": 2}),
        ("apart", {}),
        ("atta-1", {"pad": 0}),
        ("free", {"replays": 2}),
        ("fgsm-n", {}),
    ],
)
def test_certain_soft_labels_are_hard_labels(method: str, options: dict[str, Any]) -> None:
    models = [tiny_model(), tiny_model()]
    second = x.flip(3) if options.get("regularizer") == "consistency" else None
    rows = index if second is None else None
    for model, labels in zip(models, (y, torch.eye(CLASSES)[y].half()), strict=True):
        step = step_of(model, method, **options)
        for _ in range(2):
            metrics = step(x, labels, rows, second=second)
        assert "accuracy" in metrics
    assert_same(*models)


def test_the_kernel_of_hard_labels_gets_no_soft_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    """RWP's Triton kernel reads a class for each sample."""
    masked_ce, seen = kernels.masked_ce, []

    def noting(logits: Tensor, y: Tensor, c_min: float) -> Any:
        seen.append(y.ndim)
        return masked_ce(logits, y, c_min)

    monkeypatch.setattr(kernels, "masked_ce", noting)
    step = step_of(tiny_model(), "rwp", steps=1, weight_steps=1, warmup_epochs=0)
    step(x, mixup(), index)
    assert not seen
    step(x, y, index)
    assert seen == [1]


def test_the_accuracy_of_soft_labels_is_that_of_their_largest_entry() -> None:
    found = float(step_of(tiny_model())(x, mixup(), start=start)["accuracy"])
    model = tiny_model()
    x_adv = climb(model, x, start, lambda z: entropy(mixup())(z).mean(), ALPHA, 3, "train")
    assert found == float((model(x_adv).argmax(1) == mixup().argmax(1)).float().mean())


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda soft: soft * 1.002, "at least 0 and sums to 1"),
        (lambda soft: soft + torch.tensor([0.2, -0.2, 0.2, -0.2]), "at least 0 and sums to 1"),
        (lambda soft: torch.where(soft > 0.5, torch.nan, soft), "at least 0 and sums to 1"),
        (lambda soft: soft[:, :3] / soft[:, :3].sum(1, keepdim=True).clamp(min=1e-9), "3 classes"),
        (lambda soft: functional.one_hot(y, CLASSES), r"pass y\.float\(\) of one-hot rows"),
        (lambda soft: soft[:4], "soft labels"),
        (lambda soft: soft[:, :1], "criterion="),
    ],
)
@pytest.mark.parametrize("later", [False, True])
def test_soft_labels_that_are_no_distributions_are_refused(
    change: Callable[[Tensor], Tensor], sentence: str, later: bool
) -> None:
    model = tiny_model()
    step = step_of(model)
    if later:
        step(x, mixup())
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(UserError, match=sentence) as raised:
        step(x, change(mixup()))
    assert "\n" not in str(raised.value)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_rounded_soft_labels_are_taken_as_they_are(dtype: torch.dtype) -> None:
    """A row of bfloat16 numbers may sum to 1.002."""
    soft = mixup().to(dtype)
    model = tiny_model()
    for _ in range(2):
        step_of(model)(x, soft, start=start)
    own = tiny_model()
    for _ in range(2):
        by_hand(own, entropy(soft.double()), 1)
    assert_same(model, own)


def test_on_a_device_soft_labels_that_are_no_distributions_mask_the_update() -> None:
    model = tiny_model()
    step = step_of(model)
    step.internals.net.__class__ = DeviceNetwork
    step(x, mixup(), start=start)
    before = copy.deepcopy(model.state_dict())
    step(x, mixup() * 2, start=start)
    step(x, mixup(), start=start)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    with pytest.raises(TrainingError, match=r"Labels were outside .* at step 1"):
        step.check()


def test_hard_and_soft_labels_alternate_in_captured_mode() -> None:
    models = tiny_model(), tiny_model()
    steps = [step_of(model, mode=mode) for model, mode in zip(models, MODES[::2], strict=True)]
    for labels in (y, mixup(), y, mixup(4)):
        losses = [float(step(x, labels, start=start)["loss"]) for step in steps]
        assert losses[0] == losses[1]
    assert steps[1].internals.passes.recorded == 2
    assert_same(*models, 0)


@pytest.mark.parametrize("mode", ["eager", "compiled"])
def test_mixed_labels_are_smoothed_as_the_mixture_of_smoothed_ones(mode: str) -> None:
    """The attack sees the labels as they are given."""
    model, own, soft = tiny_model(), tiny_model(), mixup()
    step_of(model, mode=mode, target="label-smoothing", smoothing=0.3)(x, soft, start=start)
    smoothed = torch.zeros_like(soft)
    for row, shares in enumerate(soft):
        for label, share in enumerate(shares):
            for place in range(CLASSES):
                smoothed[row, place] += share * (0.7 if place == label else 0.1)
    optimizer = sgd(own)
    x_adv = climb(own, x, start, lambda z: entropy(soft)(z).mean(), ALPHA, 3, "train")
    descend(optimizer, entropy(smoothed)(own(x_adv)).mean())
    assert_same(model, own)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"target": "self-adaptive"}, "begin as hard ones"),
        ({"objective": "gairat"}, "was classified right"),
    ],
)
def test_parts_that_need_hard_labels_refuse_soft_ones(options: Any, reason: str) -> None:
    step = step_of(tiny_model(), "pgd", **options)
    with pytest.raises(UserError, match=f"y holds soft labels, and .*{reason}.*; pass classes"):
        step(x, mixup(), index)
    step(x, y, index)


# -- losses of the user's own ---------------------------------------------------------------------


class Head(nn.Module):
    """A tiny network whose output is (B, *shape)."""

    def __init__(self, *shape: int) -> None:
        super().__init__()
        self.inner, self.shape = tiny_model(), shape
        generator = torch.Generator().manual_seed(5)
        count = int(torch.Size(shape).numel())
        self.inner.linear = nn.Linear(5, count).double()
        with torch.no_grad():
            for parameter in self.inner.linear.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator))

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x).view(len(x), *self.shape)


def several(z: Tensor, y: Tensor) -> Tensor:
    return functional.binary_cross_entropy_with_logits(z, y, reduction="none").mean(1)


def yes_or_no(z: Tensor, y: Tensor) -> Tensor:
    return functional.binary_cross_entropy_with_logits(z.view(-1), y.view(-1), reduction="none")


def squares(z: Tensor, y: Tensor) -> Tensor:
    return (z - y).pow(2).flatten(1).mean(1)


def smooth(z: Tensor, y: Tensor) -> Tensor:
    return functional.softplus(z) - y * z


def drawn(*shape: int) -> Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(6)).double()


# name: output shape, labels, the criterion, the same loss by hand
LOSSES: dict[str, tuple[tuple[int, ...], Tensor, Any, Any]] = {
    "several labels per image": (
        (4,),
        (drawn(8, 4) > 0.5).double(),
        several,
        lambda z, y: smooth(z, y).sum(1) / 4,
    ),
    "labels between 0 and 1": ((4,), drawn(8, 4), several, lambda z, y: smooth(z, y).sum(1) / 4),
    "one logit (B,1), labels (B,)": (
        (1,),
        (drawn(8) > 0.5).double(),
        yes_or_no,
        lambda z, y: smooth(z[:, 0], y),
    ),
    "one logit (B,), labels (B,1)": (
        (),
        (drawn(8, 1) > 0.5).double(),
        yes_or_no,
        lambda z, y: smooth(z, y[:, 0]),
    ),
    "regression to one number": (
        (1,),
        drawn(8, 1),
        squares,
        lambda z, y: ((z - y) ** 2)[:, 0],
    ),
    "regression to a map": (
        (2, 3),
        drawn(8, 2, 3),
        squares,
        lambda z, y: ((z - y) ** 2).sum((1, 2)) / 6,
    ),
    "classes by a loss of one's own": (
        (4,),
        y,
        nn.CrossEntropyLoss(reduction="none"),
        lambda z, y: z.logsumexp(1) - z[torch.arange(8), y],
    ),
}


@pytest.mark.parametrize(
    "mode", [pytest.param(m, marks=pytest.mark.slow if m == "compiled" else ()) for m in MODES]
)
@pytest.mark.parametrize("name", LOSSES)
def test_a_criterion_is_fitted_and_attacked(name: str, mode: str) -> None:
    shape, labels, criterion, loss = LOSSES[name]
    model = Head(*shape)
    step = step_of(model, mode=mode, criterion=criterion)
    for _ in range(2):
        metrics = step(x, labels, start=start)
    step.check()
    assert_same(model, by_hand(Head(*shape), lambda z: loss(z, labels)))
    assert ("accuracy" in metrics) == (labels is y)


def test_fastadv_step_takes_a_criterion() -> None:
    shape, labels, criterion, loss = LOSSES["regression to a map"]
    model = Head(*shape)
    options = {"eps": EPS, "steps": 3, "alpha": ALPHA, "mode": "eager"}
    step = fastadv.step(model, sgd(model), "pgd", criterion=criterion, **options)
    for _ in range(2):
        assert set(step(x, labels, start=start)) == {"loss", "grad_norm"}
    assert_same(model, by_hand(Head(*shape), lambda z: loss(z, labels)))


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("standard", {}),
        ("fgsm", {}),
        ("fgsm-n", {}),
        ("free", {"replays": 2}),
        ("apart", {}),
        ("atta-1", {"pad": 0}),
        ("pgd", {"restarts": 2}),
        ("awp", {"steps": 2}),
        ("rwp", {"steps": 2, "weight_steps": 2, "c_min": 1.5}),
        ("rwp", {"steps": 2, "weight_steps": 2, "c_min": 1.5, "rwp_loss": "adversarial"}),
        ("pgd", {"objective": "clean-subtracted"}),
        ("pgd", {"leave_out_below": 0.5}),
        ("pgd", {"averaging": "ema"}),
    ],
)
def test_cross_entropy_as_a_criterion_changes_nothing(method: str, options: Any) -> None:
    models = tiny_model(), tiny_model()
    own = {"criterion": nn.CrossEntropyLoss(reduction="none")}
    for model, also in zip(models, ({}, own), strict=True):
        step = step_of(model, method, **options, **also)
        for _ in range(2):
            step(x, y, index)
    assert_same(*models)


@pytest.mark.parametrize("compared", ["total", "adversarial"])
def test_weights_are_perturbed_along_the_samples_with_a_small_criterion(compared: str) -> None:
    """Twice the cross entropy, at half the learning rate, compared with twice the threshold."""

    def twice(z: Tensor, y: Tensor) -> Tensor:
        return 2 * functional.cross_entropy(z, y, reduction="none")

    models = tiny_model(), tiny_model()
    options = {"steps": 2, "weight_steps": 2, "rwp_loss": compared}
    for model, factor in zip(models, (1, 2), strict=True):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1 / factor)
        own = {"criterion": twice} if factor == 2 else {}
        step = step_of(model, "rwp", c_min=1.2 * factor, optimizer=optimizer, **own, **options)
        for _ in range(2):
            step(x, y, index)
    assert_same(*models)


READ_CLASSES = [
    ("trades", {"steps": 2}),
    ("trades", {"steps": 2, "attack_loss": "fit"}),
    ("pgd", {"attack_loss": "ce"}),
    ("pgd", {"attack_loss": "kl", "start": "gaussian"}),
    ("pgd", {"objective": "gairat", "gairat_start": 0}),
    ("pgd", {"start": "gradient"}),
    ("pgd", {"regularizer": "advlc", "kind": "kl"}),
    ("pgd", {"regularizer": "logitalign"}),
    ("pgd", {"regularizer": "consistency"}),
    ("pgd", {"regularizer": "guided"}),
    ("pgd", {"regularizer": "nuclear"}),
    ("pgd", {"attack_loss": "guided"}),
    ("pgd", {"attack_loss": "nuclear"}),
    ("fast", {"adversary": "liet"}),
    ("pgd", {"objective": "ikl"}),
]
READ_THE_LOSS = [
    ("pgd", {"regularizer": "advlc"}),
    ("pgd", {"regularizer": "igr"}),
    ("pgd", {"regularizer": "cure"}),
    ("pgd", {"regularizer": "gradalign"}),
    ("standard", {"regularizer": "igr"}),
    ("pgd", {"regularizer": "elle"}),
]


def of_classes(z: Tensor, y: Tensor) -> Tensor:
    return functional.cross_entropy(z, y, reduction="none")


BOTH = [
    (*case, labels)
    for case in READ_CLASSES + READ_THE_LOSS
    for labels in (y, mixup())
    if labels.ndim == 1
    or not {"gairat", "ikl", "liet"} & {str(value) for value in case[1].values()}
]


@pytest.mark.parametrize(("method", "options", "labels"), BOTH)
def test_the_cross_entropy_as_a_criterion_changes_nothing(
    method: str, options: Any, labels: Tensor
) -> None:
    models = [tiny_model(), tiny_model()]
    second = x.flip(3) if options.get("regularizer") == "consistency" else None
    for model, own in zip(models, ({}, {"criterion": of_classes}), strict=True):
        step = step_of(model, method, **options, **own)
        for _ in range(2):
            step(x, labels, second=second)
    assert_same(*models)


def focal(z: Tensor, y: Tensor) -> Tensor:
    right = z.softmax(1).gather(1, y[:, None])[:, 0]
    return -((1 - right) ** 2) * right.log()


@pytest.mark.parametrize("mode", MODES)
def test_trades_with_a_focal_loss_is_that_loop(mode: str) -> None:
    """The user's loss at x, the KL between x and x' in the attack and in the loss."""
    model, own = tiny_model(), tiny_model()
    step = step_of(model, "trades", mode, steps=2, alpha=ALPHA, criterion=focal)
    optimizer = sgd(own)
    for _ in range(2):
        assert "accuracy" in step(x, y, start=start)
        own.eval()
        p = own(x).softmax(1).detach()
        x_adv = climb(
            own, x, start, lambda z, p=p: -(p * z.log_softmax(1)).sum(1).mean(), ALPHA, 2, "eval"
        )
        natural, adversarial = own(x), own(x_adv)
        with torch.no_grad():
            own(x)
        log_p, log_q = natural.log_softmax(1), adversarial.log_softmax(1)
        divergence = (log_p.exp() * (log_p - log_q)).sum(1)
        descend(optimizer, (focal(natural, y) + 6 * divergence).mean())
    assert_same(model, own)


def mean_smooth(z: Tensor, labels: Tensor) -> Tensor:
    return smooth(z, labels).flatten(1).mean(1)


def slope(logits: Tensor, at: Tensor, labels: Tensor) -> Tensor:
    """The gradient of each image's loss, with its own graph."""
    return torch.autograd.grad(mean_smooth(logits, labels).sum(), at, create_graph=True)[0]


def term_of(kind: str, model: nn.Module, x_adv: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """f(x') and the term of a regularizer, with the passes in their order."""
    center = x.clone().requires_grad_()
    natural = model(center) if kind in ("advlc", "gradalign") else None
    logits = model(x_adv)
    if kind == "advlc":
        return logits, (natural - logits).abs().flatten().topk(24).values.sum() / len(x)
    if kind == "igr":
        return logits, (slope(logits, x_adv, labels) / len(x)).square().sum()
    if kind == "cure":
        model.eval()
        here = slope(model(center), center, labels)
        moved = (x + EPS * here.detach().sign()).requires_grad_()
        change = slope(model(moved), moved, labels) - here
        model.train()
        return logits, torch.stack([rows.norm() for rows in change]).mean()
    here = slope(natural, center, labels)
    draw = (0, NEAR.shift, NEAR.number, torch.float64)
    noise = kernels.noise_uniform(index, x.shape[1:], *draw)
    moved = (x + EPS * noise).requires_grad_()
    near = slope(model(moved), moved, labels)
    cosines = [(a * b).sum() / a.norm() / b.norm() for a, b in zip(here, near, strict=True)]
    return logits, 1 - torch.stack(cosines).mean()


@pytest.mark.parametrize("mode", ["eager", pytest.param("compiled", marks=pytest.mark.slow)])
@pytest.mark.parametrize("kind", ["advlc", "igr", "cure", "gradalign"])
def test_a_regularizer_reads_the_users_own_loss(kind: str, mode: str) -> None:
    """Six labels per image in a (B,2,3) tensor: no classes anywhere."""
    labels = drawn(len(x), 2, 3)
    model, own = Head(2, 3), Head(2, 3)
    options = {"top_fraction": 0.5} if kind == "advlc" else {}
    options |= {"regularizer": kind, "reg_weight": 0.7, "criterion": mean_smooth}
    step_of(model, mode=mode, **options)(x, labels, index, start=start)
    optimizer = sgd(own)
    x_adv = climb(own, x, start, lambda z: mean_smooth(z, labels).mean(), ALPHA, 3, "train")
    logits, term = term_of(kind, own, x_adv.requires_grad_(), labels)
    descend(optimizer, mean_smooth(logits, labels).mean() + 0.7 * term)
    assert_same(model, own)


@pytest.mark.parametrize(("method", "options"), READ_CLASSES, ids=str)
def test_parts_that_need_logits_of_classes_are_refused_beside_others(
    method: str, options: Any
) -> None:
    """Labels of another form, and outputs of another form, in one sentence each."""
    second = x.flip(3) if options.get("regularizer") == "consistency" else None
    for criterion, model, labels in (
        (squares, tiny_model(), drawn(len(x), 2, 2)),
        (squares, Head(2, 2), y),
        (yes_or_no, Head(1), y),
    ):
        step = step_of(model, method, criterion=criterion, **options)
        with pytest.raises(UserError, match="compares predictions of classes, also") as raised:
            step(x, labels, index, second=second)
        assert "\n" not in str(raised.value)


def test_soft_labels_beside_a_criterion_are_distributions_where_classes_are_compared() -> None:
    step = step_of(tiny_model(), "trades", steps=1, criterion=several)
    with pytest.raises(UserError, match="sums to 1"):
        step(x, drawn(len(x), CLASSES))


def test_gairat_beside_a_criterion_takes_hard_labels_only() -> None:
    step = step_of(tiny_model(), objective="gairat", criterion=of_classes)
    with pytest.raises(UserError, match="was classified right"):
        step(x, mixup())


@pytest.mark.parametrize(
    "target", ["label-smoothing", "temporal-ensembling", "self-adaptive", "distillation"]
)
def test_a_criterion_replaces_no_target(target: str) -> None:
    model = tiny_model()
    with pytest.raises(UserError, match="would replace the target"):
        fastadv.step(model, sgd(model), "pgd", criterion=several, target=target)


def test_an_objective_with_a_loss_of_its_own_is_refused_beside_a_criterion() -> None:
    model = tiny_model()
    with pytest.raises(UserError, match="not by the loss of a target"):
        fastadv.step(model, sgd(model), "pgd", criterion=of_classes, objective="mart")


@pytest.mark.parametrize("mode", MODES)
def test_the_attack_alone_takes_its_criterion(mode: str) -> None:
    """The margin of the logits in the attack, the cross entropy in the loss."""

    def margin(z: Tensor, y: Tensor) -> Tensor:
        true = torch.eye(CLASSES, dtype=torch.bool)[y]
        return z.masked_fill(true, -100).logsumexp(1) - (z * true).sum(1)

    model, own = tiny_model(), tiny_model()
    step = step_of(model, mode=mode, attack_criterion=margin)
    optimizer = sgd(own)
    for _ in range(2):
        metrics = step(x, y, start=start)
        x_adv = climb(own, x, start, lambda z: margin(z, y).mean(), ALPHA, 3, "train")
        descend(optimizer, functional.cross_entropy(own(x_adv), y))
    assert_same(model, own)
    assert "accuracy" in metrics


def test_attack_and_update_take_two_criteria() -> None:
    labels, own = drawn(8, 4), tiny_model()

    def absolute(z: Tensor, y: Tensor) -> Tensor:
        return (z - y).abs().sum(1)

    model = tiny_model()
    step_of(model, criterion=squares, attack_criterion=absolute)(x, labels, start=start)
    x_adv = climb(own, x, start, lambda z: absolute(z, labels).mean(), ALPHA, 3, "train")
    descend(sgd(own), (own(x_adv) - labels).pow(2).mean())
    assert_same(model, own)


def test_a_criterion_of_the_attack_is_refused_where_no_step_follows_it() -> None:
    model = tiny_model()
    for options in ({"method": "standard"}, {"method": "pgd", "attack_loss": "ce"}):
        with pytest.raises(UserError, match="omit"):
            fastadv.step(model, sgd(model), attack_criterion=several, **options)


class WithWeights(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, z: Tensor, y: Tensor) -> Tensor:
        return self.scale * several(z, y)


@pytest.mark.parametrize(
    ("criterion", "sentence"),
    [
        (nn.BCEWithLogitsLoss(), r"shape \(8,\), not one number: pass reduction='none'"),
        (nn.BCEWithLogitsLoss(reduction="none"), r"of \(8, 4\): take the mean over the others"),
        (lambda z, y: several(z, y).detach(), "does not depend on the logits by a gradient"),
        (lambda z, y: several(y, y), "does not depend on the logits by a gradient"),
        (lambda z, y: (several(z, y) > 0).long(), r"not torch\.int64 of \(8,\)"),
        (lambda z, y: several(z, y)[:4], r"not torch\.float64 of \(4,\)\."),
        (lambda z, y: 1.0, r"not a float\."),
        (WithWeights(), "weights of its own"),
        (nn.BCEWithLogitsLoss, "criterion is a function of logits and y"),
        ("bce", "criterion is a function of logits and y"),
    ],
)
def test_a_function_that_is_no_loss_per_sample_is_refused(criterion: Any, sentence: str) -> None:
    model = tiny_model()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(UserError, match=sentence) as raised:
        step_of(model, criterion=criterion)(x, drawn(8, 4))
    assert "\n" not in str(raised.value)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_labels_of_other_samples_than_the_images_are_refused() -> None:
    step = step_of(tiny_model(), criterion=several)
    with pytest.raises(UserError, match="a shape that begins with 8, not \\(4, 4\\)"):
        step(x, drawn(4, 4))
    with pytest.raises(UserError, match="a shape that begins with 8, not \\(\\)"):
        step(x, torch.tensor(1.0))


def test_the_number_of_outputs_is_checked_if_it_is_given() -> None:
    with pytest.raises(UserError, match="num_classes is 4 but the model returns 6 outputs"):
        step_of(Head(2, 3), criterion=squares, num_classes=4)(x, drawn(8, 2, 3))


def test_the_first_look_draws_no_random_number() -> None:
    def noisy(z: Tensor, y: Tensor) -> Tensor:
        return squares(z, y) * torch.rand(len(z))

    step = step_of(tiny_model(), "standard", criterion=noisy)
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    step.internals.preparation.look(x, drawn(8, 4))
    assert torch.equal(torch.rand(3), expected)


# -- runs -----------------------------------------------------------------------------------------


def test_a_run_with_a_criterion_resumes_bit_for_bit() -> None:
    shape, labels, criterion, _ = LOSSES["several labels per image"]
    model = Head(*shape)
    step = step_of(model, criterion=criterion)
    step(x, labels)
    saved = copy.deepcopy((model.state_dict(), step.optimizer.state_dict(), step.state_dict()))
    step(x, labels)
    other = Head(*shape)
    again = step_of(other, criterion=criterion)
    for each, state in zip((other, again.optimizer, again), saved, strict=True):
        each.load_state_dict(state)
    again(x, labels)
    assert_same(model, other, 0)
    with pytest.raises(UserError, match="This state is of"):
        step_of(Head(*shape)).load_state_dict(step.state_dict())


def test_what_a_criterion_reads_is_recorded_again() -> None:
    sizes = {"weight": 1.0}

    def weighted(z: Tensor, y: Tensor) -> Tensor:
        return sizes["weight"] * squares(z, y)

    models = tiny_model(), tiny_model()
    steps = [
        step_of(model, mode=mode, criterion=weighted)
        for model, mode in zip(models, MODES[::2], strict=True)
    ]
    for weight in (1.0, 1.0, 0.5):
        sizes["weight"] = weight
        for step in steps:
            step(x, drawn(8, 4), start=start)
    assert steps[1].internals.passes.recorded == 2
    assert_same(*models, 0)


def test_a_criterion_that_decides_in_python_is_not_recorded() -> None:
    def branching(z: Tensor, y: Tensor) -> Tensor:
        return squares(z, y) * (2 if z.sum() > 0 else 1)

    step = step_of(tiny_model(), mode="captured", criterion=branching)
    with pytest.warns(UserWarning, match="the criterion looks at the value of a tensor"):
        step(x, drawn(8, 4))
    assert step.internals.passes.recorded == 0


@pytest.mark.parametrize(("method", "known"), [("trades", True), ("pgd", False), ("fgsm-n", False)])
def test_the_clean_accuracy_is_that_of_the_pass_that_the_loss_makes(
    method: str, known: bool
) -> None:
    x, y, index, _ = tiny_batch()
    model = tiny_model()
    right = (copy.deepcopy(model)(x).argmax(1) == y).double().mean()
    metrics = tiny_step(model, method)(x, y, index)
    assert ("clean_accuracy" in metrics) == known
    if known:
        assert float(metrics["clean_accuracy"]) == pytest.approx(float(right))
