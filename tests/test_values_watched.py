"""Bad values in any batch or gradient, which a step and an attack must not accept silently."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fastadv
from fastadv import TrainingError, UserError
from fastadv.errors import NotFiniteError
from fastadv.training.calls import CHECK_EVERY_CALLS

CLASSES = 4


class Backward(torch.autograd.Function):
    """The identity, whose gradient is multiplied by a number."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, factor: float) -> Tensor:
        ctx.factor = factor
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient * ctx.factor, None


class Odd(nn.Module):
    """Multiplies the gradient at its input, or in eval mode its logits, by ``factor``."""

    def __init__(self, of: str = "gradient") -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = fastadv.build_model("preact_resnet18", num_classes=CLASSES, width=2)
        self.of, self.factor = of, 1.0

    def forward(self, x: Tensor) -> Tensor:
        if self.of == "gradient":
            return self.net(Backward.apply(x, self.factor))
        logits = self.net(x)
        return logits if self.training else logits * self.factor


def batch(seed: int = 0, count: int = 8) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.rand(count, 3, 8, 8, generator=generator)
    return x, torch.arange(count) % CLASSES, torch.randperm(32, generator=generator)[:count]


def step_of(model: nn.Module, method: str, **options: Any) -> fastadv.Step:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9)
    if method == "apart":
        options["blocks"] = ["net.layer1.0.conv1"] if isinstance(model, Odd) else None
    settings = {"num_samples": 32, "total_steps": 400, "steps_per_epoch": 4, "mode": "eager"}
    return fastadv.step(model, optimizer, method, **settings | options)


def train_on(step: fastadv.Step) -> None:
    """Call the step until it is due to read the fault flag."""
    for _ in range(CHECK_EVERY_CALLS):
        step(*batch(1))


def weights(model: nn.Module) -> list[Tensor]:
    return [value.clone() for value in model.state_dict().values()]


# -- gradients that are not finite ----------------------------------------------------------------


@pytest.mark.parametrize("factor", [float("nan"), float("inf")])
@pytest.mark.parametrize(
    "method", ["fgsm-plus", "apart", "free", "pgd", "fast", "n-fgsm", "fgsm-n", "atta-1", "trades"]
)
def test_an_input_gradient_that_is_not_finite_is_an_error(method: str, factor: float) -> None:
    model = Odd()
    step = step_of(model, method)
    step(*batch(0))
    before, state = weights(model), {k: v.clone() for k, v in step.state.items()}
    model.factor = factor
    step(*batch(1))
    model.factor = 1.0
    assert not step.healthy()
    step(*batch(2))
    assert all(map(torch.equal, weights(model), before))
    assert all(torch.equal(step.state[name], value) for name, value in state.items())
    with pytest.raises(TrainingError, match=r"not finite at step \d+;"):
        step.check()


@pytest.mark.parametrize(
    "method", ["pgd-eval", "trades", pytest.param("te", marks=pytest.mark.slow)]
)
def test_logits_that_are_not_finite_in_the_attack_alone_end_training(method: str) -> None:
    """The loss of the outer pass, in training mode, is finite all the time."""
    model = Odd("logits in eval mode")
    options = {"te_start": 0, "te_end": 0} if method == "te" else {}
    step = step_of(model, method, steps=1, **options)
    step(*batch(0))
    model.factor = float("nan")
    with pytest.raises(TrainingError, match="gradient of the attack was not finite"):
        train_on(step)


def test_an_attack_on_outputs_that_are_not_finite_is_an_error() -> None:
    x, y, _ = batch()
    for model in (Odd(), Odd("logits in eval mode")):
        model.factor = float("nan")
        for name in ("fgsm", "pgd-3", "cw-3", "pgd-2-2"):
            with pytest.raises(NotFiniteError):
                fastadv.attack(model, x, y, name)


def test_a_gradient_of_nan_gives_no_robust_accuracy() -> None:
    """With a gradient that is NaN no attack moves anything, and 98 % would be right."""
    model = Odd().eval()
    x, _, _ = batch(count=24)
    y = model(x).argmax(1)
    model.factor = float("nan")
    for name in ("fgsm", "fgsm-rwp", "pgd-5", "cw-5", "cw-margin-5", "pgd-3-2"):
        with pytest.raises(NotFiniteError, match="no attack"):
            fastadv.evaluate(model, [(x[:12], y[:12]), (x[12:], y[12:])], ("clean", name))
    assert fastadv.evaluate(model, [(x, y)], ("clean",))["clean"] == 1.0


def test_a_scaler_that_skips_every_update_is_reported() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = fastadv.build_model("preact_resnet18", num_classes=CLASSES, width=2)
            self.factor = 1.0

        def forward(self, x: Tensor) -> Tensor:
            return Backward.apply(self.net(x), self.factor if self.weighs(x) else 1.0)

        def weighs(self, x: Tensor) -> bool:  # the pass that learns, not the attack's
            return any(parameter.requires_grad for parameter in self.parameters())

    model, scaler = Net(), torch.amp.GradScaler("cpu")
    step = step_of(model, "fgsm", scaler=scaler)
    model.factor = float("inf")
    before = weights(model)
    with pytest.raises(TrainingError, match="updates were skipped"):
        train_on(step)
    assert not step.healthy()
    names = model.state_dict()
    moved = [n for n, b in zip(names, before, strict=True) if not torch.equal(names[n], b)]
    assert not [name for name in moved if "weight" in name]


def test_a_loss_scale_that_is_too_large_at_first_is_no_error() -> None:
    model, scaler = Odd(), torch.amp.GradScaler("cpu", init_scale=2.0**127, growth_interval=10**6)
    step = step_of(model, "standard", scaler=scaler)
    for _ in range(20):
        step(*batch())
    step.check()
    assert 0 < scaler.get_scale() < 2.0**127


# -- gradients that are zero ----------------------------------------------------------------------


class Rounded(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = fastadv.build_model("preact_resnet18", num_classes=CLASSES, width=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.net((x * 255).round() / 255)


@pytest.mark.parametrize("method", ["pgd", "fgsm", "fast", "apart", "atta-1", "trades"])
def test_training_warns_of_an_attack_that_moves_nothing(method: str) -> None:
    options = {"blocks": ["net.layer1.0.conv1"]} if method == "apart" else {}
    if method in ("pgd", "trades"):
        options["steps"] = 1
    torch.manual_seed(0)
    optimizer_of = {"num_samples": 32, "total_steps": 400, "mode": "eager", **options}
    model = Rounded()
    if method == "atta-1":
        optimizer_of["steps_per_epoch"] = 400
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02)
    step = fastadv.step(model, optimizer, method, **optimizer_of)
    for _ in range(3):
        step(*batch())
    with pytest.warns(UserWarning, match=r"moved no pixel of 24 of 24 images \(100 %\)"):
        step.check()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        step.check()


@pytest.mark.parametrize(
    ("method", "options"),
    [("pgd", {}), ("pgd", {"eps": 0}), ("fast", {"alpha": 0.0}), ("fgsm", {}), ("standard", {})],
)
def test_a_working_attack_is_not_warned_about(method: str, options: dict[str, Any]) -> None:
    step = step_of(Odd(), method, **options)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", "alpha 0: the attack takes no step")
        for _ in range(3):
            step(*batch())
        step.check()
    assert not [sentence for sentence in step.advice() if "moved no pixel" in sentence]


# -- values of a batch ----------------------------------------------------------------------------

LATER = {
    "pixels 0..255": (lambda x, y, i: (x * 255, y, i), r"lie in \[0, 1\]"),
    "normalised pixels": (lambda x, y, i: ((x - 0.5) / 0.25, y, i), r"lie in \[0, 1\]"),
    "an ignored label": (lambda x, y, i: (x, torch.full_like(y, -100), i), "no label is ignored"),
    "a label too large": (lambda x, y, i: (x, y + 1, i), r"lie in \[0, 3\]"),
    "a row before the first": (lambda x, y, i: (x, y, i - 32), "outside the 32 samples"),
    "a row after the last": (lambda x, y, i: (x, y, i + 32), "outside the 32 samples"),
}


@pytest.mark.parametrize("later", [False, True])
@pytest.mark.parametrize("wrong", LATER)
def test_values_are_checked_in_every_batch(wrong: str, later: bool) -> None:
    change, sentence = LATER[wrong]
    model = Odd()
    step = step_of(model, "te", te_start=0, te_end=0)
    if later:
        step(*batch(0))
    before = weights(model)
    with pytest.raises(UserError, match=sentence):
        step(*change(*batch(1)))
    assert all(map(torch.equal, weights(model), before))
    step(*batch(1))
    assert step.healthy()


@pytest.mark.parametrize("wrong", LATER)
def test_where_a_check_would_synchronise_the_device_records_the_fault(wrong: str) -> None:
    from tiny_capture import DeviceNetwork

    change, _ = LATER[wrong]
    model = Odd()
    step = step_of(model, "te", te_start=0, te_end=0)
    step.internals.net.__class__ = DeviceNetwork
    step(*batch(0))
    before, state = weights(model), step.state["predictions"].clone()
    step(*change(*batch(1)))
    step(*batch(2))
    assert all(map(torch.equal, weights(model), before))
    assert torch.equal(step.state["predictions"], state)
    with pytest.raises(TrainingError, match="at step 1"):
        step.check()


def test_rounding_errors_are_clipped_by_step_and_attack() -> None:
    x, y, _ = batch()
    off = x.clone()
    off[0, 0, 0, 0], off[1, 0, 0, 0] = -3e-8, 1 + 1e-6
    cut = off.clamp(0, 1)
    steps = [step_of(Odd(), "pgd", steps=1) for _ in range(2)]
    for step, images in zip(steps, (off, cut), strict=True):
        step(images, y)
        step(images, y)
    assert all(map(torch.equal, weights(steps[0].model), weights(steps[1].model)))
    model = Odd()
    assert torch.equal(fastadv.attack(model, off, y), fastadv.attack(model, cut, y))
    assert fastadv.attack(model, off, y).aminmax().min >= 0
    for far in (x - 1e-3, x + 1e-2):
        with pytest.raises(UserError, match=r"\[0, 1\]"):
            steps[0](far, y)
        with pytest.raises(UserError, match=r"\[0, 1\]"):
            fastadv.attack(model, far, y)


# -- sentences in place of tracebacks -------------------------------------------------------------


def test_images_of_another_type_than_the_weights_are_refused() -> None:
    x, y, _ = batch()
    calls = (
        lambda m: step_of(m, "pgd")(x.double(), y),
        lambda m: fastadv.attack(m, x.double(), y),
        lambda m: fastadv.evaluate(m, [(x.double(), y)]),
    )
    for call in calls:
        with pytest.raises(UserError, match=r"pass x\.to\(torch\.float32\)"):
            call(Odd())


def test_a_single_logit_is_refused() -> None:
    x, _, _ = batch()
    y = torch.zeros(8, dtype=torch.int64)
    model = nn.Sequential(nn.Flatten(), nn.Linear(192, 1))
    calls = (
        lambda: step_of(model, "pgd")(x, y),
        lambda: fastadv.attack(model, x, y),
        lambda: fastadv.evaluate(model, [(x, y)]),
    )
    for call in calls:
        with pytest.raises(UserError, match="single logit"):
            call()


@pytest.mark.parametrize(
    ("change", "way_out"),
    [
        (lambda y: y.int(), r"pass y\.long\(\)"),
        (lambda y: y[:, None], r"pass y\.squeeze\(1\)"),
        (lambda y: nn.functional.one_hot(y, 4), r"pass y\.float\(\) of one-hot rows, or y\.argmax"),
        (lambda y: y.float(), "pass a loss of your own, criterion="),
        (lambda y: y[:, None].float(), "pass a loss of your own, criterion="),
    ],
)
def test_labels_in_another_form_are_refused(change: Any, way_out: str) -> None:
    x, y, _ = batch()
    with pytest.raises(UserError, match=way_out):
        step_of(Odd(), "pgd")(x, change(y))


def test_a_last_batch_of_one_image_is_refused() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(192, 8), nn.BatchNorm1d(8), nn.Linear(8, 4))
    step = step_of(model, "pgd")
    x, y, _ = batch()
    step(x, y)
    before = weights(model)
    with pytest.raises(UserError, match="drop the last batch"):
        step(x[:1], y[:1])
    assert all(map(torch.equal, weights(model), before))


def test_inside_inference_mode() -> None:
    x, y, _ = batch()
    plain, inside = step_of(Odd(), "pgd"), step_of(Odd(), "pgd")
    plain(x, y)
    with torch.inference_mode():
        inside(x.clone(), y.clone())
    assert all(map(torch.equal, weights(plain.model), weights(inside.model)))
    with torch.inference_mode():
        model = Odd()
    with pytest.raises(UserError, match="inference_mode"):
        step_of(model, "pgd")


def test_the_default_radius_in_l2_is_128_255() -> None:
    x, y, _ = batch()
    model = Odd()
    moved = (fastadv.attack(model, x, y, "pgd", norm="l2") - x).flatten(1).norm(dim=1)
    assert moved.max() > 100 / 255
    assert moved.max() <= 128 / 255 * (1 + 1e-5)
    assert fastadv.Threat("l2").eps == 128 / 255
    assert fastadv.Threat().eps == 8 / 255
    usual = fastadv.evaluate(model, [(x, y)], ("pgd-5",), norm="l2")
    assert usual == fastadv.evaluate(model, [(x, y)], ("pgd-5",), norm="l2", eps="128/255")
