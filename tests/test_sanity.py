"""The sanity of a claim: what hides its gradient fails, what does not passes, at a known cost."""

from __future__ import annotations

import json
import re
import warnings
from fractions import Fraction
from math import comb, sqrt
from pathlib import Path
from typing import Any

import pytest
import torch
from sanity_nets import EPS, HONEST, IMAGES, Around, batches, digits, honest, linear, masked
from torch import Tensor, nn

import fastadv
from fastadv import Threat, UserError
from fastadv.evaluation.sanity import checks, gradients, outputs, rounding, strength
from fastadv.evaluation.sanity.chance import is_above, is_weaker, sign_test
from fastadv.evaluation.sanity.finding import Finding, Report
from fastadv.evaluation.sanity.trial import Trial


def report_of(model: nn.Module, **options: Any) -> Report:
    return fastadv.sanity(model, batches(), **{"eps": EPS, "limit": IMAGES} | options)


def failed(report: Report) -> set[str]:
    return {finding.check for finding in report.failed}


def trial_of(model: nn.Module, count: int = 40, threat: Threat | None = None) -> Trial:
    """A trial that no check has seen, on images that the network classifies correctly."""
    from fastadv.evaluation.attacks.inputs import attacked_network

    _, _, x, y = digits()
    with torch.no_grad():
        right = (model(x).argmax(1) == y).nonzero().squeeze(1)[:count]
        logits = model(x[right])
    net = attacked_network(model, torch.device("cpu"), False)
    threat = threat or Threat("linf", EPS)
    return Trial(
        model, net, threat, x[right], y[right], right, logits, total=count, batch=32, seed=0
    )


@pytest.mark.parametrize(
    "name",
    [name if name == "pgd" else pytest.param(name, marks=pytest.mark.slow) for name in HONEST],
)
def test_honest_networks_pass(name: str) -> None:
    report = report_of(honest(name))
    assert report.passed, str(report)
    assert [finding.passed for finding in report.findings] == [True] * len(checks.CHECKS)
    assert "passed all 11 checks on 100 images" in str(report)


@pytest.mark.parametrize("base", ["standard", pytest.param("pgd", marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    ("name", "found"),
    [
        pytest.param(
            "8 bits",
            {"gradient", "slope", "larger eps", "black box", "random search", "transfer"},
            marks=pytest.mark.slow,
        ),
        ("softmax", {"logits", "gradient", "slope", "larger eps", "black box", "transfer"}),
        ("temperature", {"gradient", "loss", "larger eps"}),
        ("random", {"same outputs"}),
    ],
)
def test_masked_networks_fail(name: str, found: set[str], base: str) -> None:
    """Each is found by several checks, also where the network behind is robust in truth."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # the report says it once
        report = report_of(masked(name, base))
    assert not report.passed
    assert failed(report) >= found, str(report)
    assert f"failed {len(report.failed)} of 11 checks" in report.verdict()


def test_outputs_that_depend_on_the_other_images_of_a_batch_are_seen() -> None:
    shifted = Around(honest("standard"), behind=lambda logits: logits - 0.5 * logits.mean(0))
    for model, passes in ((shifted, False), (honest("standard"), True)):
        trial = trial_of(model)
        trial.batch = len(trial)
        trial.logits = trial.seen(trial.x)
        assert outputs.repeats(trial).passed == passes


def test_a_report_is_the_same_twice_and_leaves_the_model_as_it_was() -> None:
    model = honest("pgd").train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    drawn = torch.get_rng_state()
    first, second = report_of(model), report_of(model)
    assert first == second
    assert json.loads(json.dumps(first.as_json())) == first.as_json()
    assert first.as_json()["checks"][2]["zero"] == 0
    assert model.training
    assert all(value.equal(before[name]) for name, value in model.state_dict().items())
    assert drawn.equal(torch.get_rng_state())
    model.eval()


class Counting(nn.Module):
    """Counts the images of forward and backward passes."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.forwards = self.backwards = 0

    def forward(self, x: Tensor) -> Tensor:
        self.forwards += len(x)
        logits = self.model(x)
        if logits.requires_grad:
            logits.register_hook(self._note)
        return logits

    def _note(self, gradient: Tensor) -> None:
        self.backwards += len(gradient)


@pytest.mark.parametrize(
    "name", ["pgd", pytest.param("8 bits", marks=pytest.mark.slow, id="8 bits")]
)
def test_the_cost_is_below_pgd_200_and_said_before(name: str) -> None:
    model = Counting(honest(name) if name in HONEST else masked(name))
    said: list[str] = []
    ticks: list[tuple[int, int]] = []
    report = report_of(
        model, say=said.append, progress=lambda done, most: ticks.append((done, most))
    )
    cost = (model.forwards + 2 * model.backwards) / report.right
    # A network is first looked at with a few images, in each attack.
    assert 0.9 * cost <= report.passes <= checks.MOST_PASSES < 600
    assert ticks == sorted(ticks)
    assert ticks[-1] == (report.passes * report.right, checks.MOST_PASSES * report.right)
    (sentence,) = said
    assert f"checking {report.right} correctly classified of {IMAGES} images" in sentence
    assert f"at most {checks.MOST_PASSES} forward passes each (PGD-200: 600), about" in sentence


def test_what_is_chance() -> None:
    assert sign_test(8, 0) == 2**-8
    assert sign_test(5, 1) == Fraction(comb(6, 5) + 1, 64)
    assert sign_test(0, 0) == sign_test(0, 9) == 1
    assert is_weaker(8, 0)
    assert not is_weaker(7, 0)
    assert not is_weaker(60, 50)
    assert is_weaker(180, 100)
    # Wilson's interval of 5 of 200 begins at 1.07 %, that of 4 at 0.78 %.
    assert is_above(5, 200, 0.01)
    assert not is_above(4, 200, 0.01)


class Wrong(torch.autograd.Function):
    """The identity, with a backward pass that is ``factor`` times that of it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, factor: float) -> Tensor:
        ctx.factor = factor
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return ctx.factor * gradient, None


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize(
    ("factor", "passes"), [(1.0, True), (1.5, True), (3.0, False), (-1.0, False), (0.0, False)]
)
def test_a_backward_pass_of_another_function_is_seen(
    factor: float, passes: bool, norm: str
) -> None:
    model = Around(honest("linear"), before=lambda x: Wrong.apply(x, factor))
    trial = trial_of(model, threat=Threat(norm, EPS))
    finding = gradients.true(trial)
    assert finding.passed is passes
    assert finding.numbers == {"untrue": 0 if passes else 40, "of": 40}


def test_rounding_with_a_gradient_passed_through_is_honest() -> None:
    """The straight-through gradient finds what there is, so nothing is masked."""

    def through(x: Tensor) -> Tensor:
        return x + ((x * 255).round() / 255 - x).detach()

    assert report_of(Around(honest("standard"), before=through)).passed


def test_log_odds_are_those_of_the_probability() -> None:
    logits = torch.randn(5, 4, dtype=torch.float64)
    y = torch.tensor([0, 1, 2, 3, 0])
    right = logits.softmax(1)[torch.arange(5), y]
    torch.testing.assert_close(gradients.odds(logits, y), ((1 - right) / right).log())
    confident = torch.tensor([[1e4, 0.0, 0.0]])
    assert float(gradients.odds(confident, torch.tensor([0]))) == pytest.approx(-1e4, abs=1)


def test_a_weaker_attack_with_more_steps_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    trial = trial_of(honest("standard"))
    right = {"fgsm": 5, "pgd-10": 13, "pgd-50": 0}

    def by_gradient(self: Trial, name: str, passes: int, **options: Any) -> Any:
        found = trial.judged(trial.x, trial.y)
        return found._replace(right=torch.arange(40) < right[name])

    monkeypatch.setattr(Trial, "by_gradient", by_gradient)
    finding = strength.more_steps(trial)
    assert not finding.passed
    assert "fgsm fools the network on 8 images that resist pgd-10, and on only 0" in str(finding)
    right["pgd-10"] = 12  # of seven throws chance gives none in 0.8 % of the cases
    assert strength.more_steps(trial).passed


def test_the_largest_ball_holds_the_box() -> None:
    x = torch.zeros(2, 3, 4, 5)
    assert strength.widest_of(Threat("linf", 0.1), x).eps == 1
    assert strength.widest_of(Threat("linf", 0.1, low=-1.0, high=2.0), x).eps == 3
    assert strength.widest_of(Threat("l2", 0.1), x).eps == sqrt(60)


def test_rounding_counts_what_it_undoes() -> None:
    """An adversarial image that is right again on the 8-bit grid, for half of the images."""

    class Between(nn.Module):
        """Class 1 if the first pixel is off the grid of 8 bits and the second one is 1."""

        def forward(self, x: Tensor) -> Tensor:
            level = x[:, 0, 0, 0] * 255
            off = ((level - level.round()).abs() > 0.01) & (x[:, 0, 0, 1] > 0.5)
            return torch.stack([~off, off], 1).float()

    x = torch.zeros(40, 1, 1, 2)
    found = x.clone()
    found[..., 0] = 10.3 / 255
    found[..., 1] = 1.0
    net = fastadv.evaluation.attacks.inputs.attacked_network(Between(), torch.device("cpu"), False)
    y = torch.zeros(40, dtype=torch.int64)
    trial = Trial(
        Between(), net, Threat("linf", 1.0), x, y, torch.arange(40), Between()(x),
        total=40, batch=16, seed=0,
    )  # fmt: skip
    trial._named[strength.LONGEST] = trial.judged(found, y)
    assert rounding.survives(trial).numbers == {"undone": 40, "of": 40}
    assert rounding.survives(trial).passed is False
    found[..., 0] = 2.0 * found[..., 0].round()
    trial._named[strength.LONGEST] = trial.judged(x + 0.001, y)
    skipped = rounding.survives(trial)
    assert skipped.passed is None
    assert str(skipped).startswith("skipped 8 bits: pgd-50 fools no image")


def test_another_network_is_tried() -> None:
    """The adversarial images of the network itself, without its rounding, fool the rounded one."""
    report = report_of(masked("8 bits"), other=honest("standard"))
    transfer = next(finding for finding in report.findings if finding.check == "transfer")
    assert not transfer.passed
    assert "transferred from the other network, adversarial images fool" in transfer.sentence
    assert transfer.numbers["only"] > 60


def test_balls_of_l2() -> None:
    report = report_of(honest("pgd"), norm="l2", eps=1.0)
    assert report.passed, str(report)
    assert "eps 8" in str(report)  # the diagonal of 64 pixels


@pytest.mark.slow
def test_masked_in_l2() -> None:
    found = failed(report_of(masked("8 bits"), norm="l2", eps=1.0))
    assert found >= {"gradient", "slope", "larger eps", "black box", "transfer"}


def test_two_classes() -> None:
    """There is no ratio of three logits: the cross entropy takes its place."""
    x, y, test, labels = digits()
    few, held = y < 2, labels < 2
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 2))
    optimizer = torch.optim.Adam(model.parameters(), 0.05)
    for _ in range(50):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x[few]), y[few]).backward()
        optimizer.step()
    assert fastadv.sanity(model, [(test[held], labels[held])], eps=EPS).passed


class Constant(nn.Module):
    def __init__(self, value: float) -> None:
        super().__init__()
        self.value = value

    def forward(self, x: Tensor) -> Tensor:
        return self.value * torch.ones(len(x), 10) + 0 * x.flatten(1)[:, :10]


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"eps": 0}, "eps is 0"),
        ({"eps": 1.5}, "more than the whole range"),
        ({"limit": 0}, "limit must be at least 1"),
        ({"threat": Threat("linf", EPS, targeted=True), "eps": None}, "without mask or targets"),
        ({"threat": Threat("linf", (EPS,)), "eps": None}, "one eps and one range for all channels"),
        ({"threat": Threat("linf", torch.tensor([EPS, EPS])), "eps": None}, "one eps for all"),
    ],
)
def test_refusals(options: dict[str, Any], sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        report_of(linear(), **options)


def test_refused_data_and_outputs() -> None:
    x, y = batches(8)[0]
    for batch, sentence in (
        ([], "no images"),
        ([x], "must be pairs"),
        ([(255 * x, y)], r"must lie in \[0, 1\]"),
        ([(x, y + 5)], "Labels must lie in"),
        ([(x, torch.eye(10)[y])], "one class each"),
    ):
        with pytest.raises(UserError, match=sentence):
            fastadv.sanity(honest("linear"), batch, eps=EPS)
    with pytest.raises(UserError, match="classifies none of 8 images"):
        fastadv.sanity(Constant(1.0), [(x, torch.full_like(y, 9))], eps=EPS)
    with pytest.raises(fastadv.UserError, match="not finite"):
        fastadv.sanity(Constant(float("nan")), [(x, y)], eps=EPS)


def test_findings_in_words() -> None:
    findings = tuple(
        Finding(name, passed, "so it is", {})
        for name, passed in (("a", True), ("b", False), ("c", None))
    )
    report = Report(findings, n=20, right=19, standing=3, passes=10.0)
    assert str(report).splitlines() == [
        "passed  a: so it is",
        "FAILED  b: so it is",
        "skipped c: so it is",
        "failed 1 of 3 checks on 20 images (b): a robust accuracy of this network by gradient "
        "attacks means nothing",
    ]


def test_the_page_lists_the_checks_and_their_cost() -> None:
    page = (Path(__file__).parents[1] / "docs" / "judging-a-model.md").read_text()
    table = re.findall(r"^\| ([\w ]+) \| .* \| (\d+) \|$", page, re.M)
    names = [finding.check for finding in report_of(honest("linear"), limit=20).findings]
    costs = [check.passes for check in checks.CHECKS]
    assert [(name, int(passes)) for name, passes in table] == list(zip(names, costs, strict=True))
    (block,) = re.findall(r"<!-- sanity -->\n```python\n(.*?)^```", page, re.M | re.S)
    x, y = batches(20)[0]
    space = {"fastadv": fastadv, "model": honest("standard"), "x": x, "y": y}
    exec(compile(block, "judging-a-model.md", "exec"), space)
    assert space["report"].n == 20
