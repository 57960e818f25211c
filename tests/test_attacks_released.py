"""PGD and CW in the forms of released code, against the same attacks image by image, in float64."""

from __future__ import annotations

import pytest
import torch
from test_attacks import images, linear_model, small_net
from torch import Tensor, nn

from fastadv import kernels
from fastadv.engine.compiled import Runner
from fastadv.engine.model.network import Network
from fastadv.errors import UserError
from fastadv.evaluation.accuracy import evaluate, verdicts_of
from fastadv.evaluation.attacks import attack, parse_attack
from fastadv.evaluation.attacks.problem import STREAM
from fastadv.evaluation.attacks.searched import stages_of
from fastadv.evaluation.search import cascade
from fastadv.evaluation.search.cascade import Stage
from fastadv.evaluation.search.passes import Passes
from fastadv.evaluation.search.pgd import Pgd
from fastadv.evaluation.search.rows import joined
from fastadv.evaluation.search.search import Images
from fastadv.evaluation.tally import Halt, Tally
from fastadv.threat import Threat

SEED, COUNT = 3, 20
EPS = {"linf": 0.06, "l2": 0.6}
ALPHA = {"linf": 0.02, "l2": 0.2}


def cross_entropy(z: Tensor, label: int) -> Tensor:
    return z.exp().sum().log() - z[label]


def margin(z: Tensor, label: int) -> Tensor:
    return torch.cat([z[:label], z[label + 1 :]]).max() - z[label]


def hinge(z: Tensor, label: int) -> Tensor:
    others = [z[j] for j in range(len(z)) if j != label]
    ahead = z[label] - torch.stack([*others, torch.zeros_like(z[0])]).max() + 10
    return -ahead if ahead > 0 else 0 * z.sum()


LOSSES = {"pgd": cross_entropy, "pgd-margin": margin, "cw": hinge, "cw-margin": margin}


def inside(moved: Tensor, x: Tensor, norm: str) -> Tensor:
    """``moved`` (C,H,W) in the ball around ``x``, then in [0,1]."""
    away = moved - x
    if norm == "linf":
        away = away.clamp(-EPS[norm], EPS[norm])
    elif away.norm() > EPS[norm]:
        away = away * EPS[norm] / away.norm()
    return (x + away).clamp(0, 1)


def by_hand(
    model: nn.Module, x: Tensor, y: Tensor, norm: str, kind: str, steps: int, runs: int, form: str
) -> Tensor:
    """x' (B,C,H,W): ``kind`` with ``steps`` steps from each of ``runs`` starts."""
    stopped, loss = "stopped" in form or kind == "cw-margin", LOSSES[kind]
    found = []
    for i, label in enumerate(y.tolist()):
        kept, height = x[i], -torch.inf
        for run in range(runs):
            index, drawn = torch.tensor([i]), (SEED, run)
            if norm == "linf":
                noise = kernels.noise_uniform(index, x.shape[1:], *drawn, STREAM, x.dtype)[0]
                point = x[i] + EPS[norm] * noise
            else:
                box = (-torch.inf, torch.inf)
                point = kernels.l2_start(x[i : i + 1], EPS[norm], index, *drawn, *box, STREAM)[0]
            if "unclipped" not in form:
                point = point.clamp(0, 1)
            for _ in range(steps):
                leaf = point.clone().requires_grad_()
                z = model(leaf[None])[0]
                if stopped and int(z.argmax()) != label:
                    break
                (slope,) = torch.autograd.grad(loss(z, label), leaf)
                direction = slope.sign() if norm == "linf" else slope / (slope.norm() + 1e-10)
                point = inside(point + ALPHA[norm] * direction, x[i], norm)
            z = model(point[None])[0].detach()
            fools = int(z.argmax()) != label
            if "largest" in form:
                if cross_entropy(z, label) >= height:
                    kept, height = point, float(cross_entropy(z, label))
            elif fools or loss(z, label) > height:
                kept, height = point, float(loss(z, label))
                if fools:
                    break
        found.append(kept)
    return torch.stack(found)


def labelled() -> tuple[nn.Module, Tensor, Tensor]:
    """A network, and images of which every fifth is wrong without an attack; some pixels are at the
    ends of the range."""
    model, (x, _) = small_net(), images(COUNT)
    x = (1.4 * x - 0.2).clamp(0, 1)
    y = model(x).argmax(1)
    y[::5] = (y[::5] + 1) % 5
    return model, x, y


FORMS = [
    ("pgd", 4, 4, ""),
    ("pgd", 4, 4, "largest"),
    ("pgd", 4, 4, "stopped-largest"),
    ("pgd", 5, 1, "stopped"),
    ("pgd", 4, 3, "stopped"),
    ("pgd", 3, 1, "unclipped"),
    ("pgd", 3, 3, "unclipped-largest"),
    ("pgd-margin", 3, 4, "largest"),
    ("cw", 3, 4, "largest"),
    ("cw", 3, 2, "unclipped"),
    ("cw", 3, 3, "largest-stopped"),
    ("cw-margin", 3, 4, ""),
    ("cw-margin", 3, 4, "largest"),
]


def name_of(kind: str, steps: int, runs: int, form: str) -> str:
    return f"{kind}-{steps}-{runs}-{form}" if form else f"{kind}-{steps}-{runs}"


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("form", FORMS, ids=lambda form: name_of(*form))
def test_a_form_is_the_attack_image_by_image(form: tuple[str, int, int, str], norm: str) -> None:
    model, x, y = labelled()
    expected = by_hand(model, x, y, norm, *form)
    options = {"norm": norm, "alpha": ALPHA[norm], "seed": SEED}
    found = attack(model, x, y, name_of(*form), eps=EPS[norm], **options)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
    right = model(expected).argmax(1) == y
    assert 0 < right.sum() < COUNT
    scores = evaluate(
        model, zip(x.split(7), y.split(7), strict=True), [name_of(*form)], eps=EPS[norm], **options
    )
    assert scores.verdicts[name_of(*form)].right.tolist() == right.tolist()
    if form[3]:
        plain = attack(model, x, y, name_of(*form[:3], ""), eps=EPS[norm], **options)
        assert not torch.allclose(plain, found)


def fixed_or_not(monkeypatch: pytest.MonkeyPatch, fixed: bool) -> None:
    """With ``fixed`` the engine of devices."""
    if fixed:
        monkeypatch.setattr(Network, "syncs_are_free", False)


def by_search(
    model: nn.Module, x: Tensor, y: Tensor, name: str, threat: Threat, alpha: float | None = None
) -> tuple[Stage, Tensor, Tensor]:
    """The search, x' (B,C,H,W) and (B,) bool: it has succeeded."""
    (stage,) = stages_of(parse_attack(name).with_options(alpha=alpha), threat, SEED, 5, again=False)
    pictures = Images(x, y, torch.arange(len(x)), model(x).detach())
    rows = cascade.entering(pictures, pictures.index, targeted=threat.targeted, spares=False)
    with Passes(Network(model, x.device, Runner())) as passes:
        found = joined(cascade.run([stage], iter([rows]), passes, 6))
    order = found["place"].argsort()
    return stage, found["found"][order], found["fooled"][order]


@pytest.mark.parametrize("fixed", [False, True])
@pytest.mark.parametrize("form", FORMS, ids=lambda form: name_of(*form))
def test_a_search_gives_what_the_attack_on_one_batch_gives(
    form: tuple[str, int, int, str], fixed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Six slots for all images: the runs of an image are in different batches."""
    fixed_or_not(monkeypatch, fixed)
    model, x, y = labelled()
    threat = Threat("linf", 0.06)
    expected = attack(model, x, y, name_of(*form), threat=threat, alpha=0.02, seed=SEED)
    stage, found, fooled = by_search(model, x, y, name_of(*form), threat, alpha=0.02)
    wrong = model(expected).argmax(1) != y
    assert fooled.tolist() == wrong.tolist()
    # Where one that stops fools nothing, a search keeps the strongest point of all, not the last.
    same = wrong | stage.search.last_alone
    torch.testing.assert_close(found[same], expected[same], rtol=0, atol=1e-12)


def test_the_largest_loss_is_judged_and_not_any_that_fools() -> None:
    """The accuracy is not lower, and here it is higher: another run fools the network."""
    model, (x, _) = small_net(), images(256)
    y = model(x).argmax(1)
    names = ["pgd-3-5", "pgd-3-5-largest", "pgd-3-5-stopped", "pgd-3-5-stopped-largest"]
    scores = evaluate(model, [(x, y)], names, eps=0.05)
    right = {name: torch.from_numpy(scores.verdicts[name].right) for name in names}
    for name in ("pgd-3-5", "pgd-3-5-stopped"):
        assert (right[name] <= right[f"{name}-largest"]).all()
    assert right["pgd-3-5-stopped"].sum() < right["pgd-3-5-stopped-largest"].sum()


def test_a_sample_that_stops_is_fooled_wherever_one_that_goes_on_is() -> None:
    model, (x, _) = small_net(), images(256)
    y = model(x).argmax(1)
    for name in ("pgd-6", "pgd-4-3", "cw-6"):
        going, stopped = (attack(model, x, y, each, eps=0.05) for each in (name, f"{name}-stopped"))
        fooled = [model(each).argmax(1) != y for each in (going, stopped)]
        assert (fooled[0] <= fooled[1]).all()
        apart = (going - stopped).flatten(1).abs().amax(1) > 0
        assert apart.any()
        assert (fooled[1] | ~apart).all()


def test_no_verdict_of_a_linear_network_depends_on_stopping() -> None:
    """It leads a sample ever further away, so that none is moved back."""
    model, _ = linear_model()
    x, _ = images(200, classes=2, shape=(1, 3, 4))
    y = model(x).argmax(1)
    names = ["pgd-10", "pgd-10-stopped", "pgd-10-3", "pgd-10-3-stopped", "pgd-10-3-largest"]
    scores = evaluate(model, [(x, y)], names, eps=0.1, alpha=0.02)
    assert 0 < scores["pgd-10"] < 1
    assert len(set(scores.values())) == 1
    for name in names:
        assert (scores.verdicts[name].right == scores.verdicts["pgd-10"].right).all()


def test_equal_losses_are_judged_by_the_last_run() -> None:
    """A network that is sure of its answer has a cross entropy of 0 everywhere, and no gradient."""

    class Sure(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one = nn.Parameter(torch.ones(1, dtype=torch.float64))

        def forward(self, x: Tensor) -> Tensor:
            first = 0 * x.flatten(1).sum(1)
            return torch.stack([first + 5000 * self.one, first, first], 1)

    x, y = images(3)[0], torch.zeros(3, dtype=torch.int64)
    found = attack(Sure(), x, y, "pgd-2-3-largest", eps=0.1, seed=SEED)
    last = kernels.linf_start(x, 0.1, torch.arange(3), SEED, 2, stream=STREAM)
    torch.testing.assert_close(found, last, rtol=0, atol=1e-12)
    _, found, _ = by_search(Sure(), x, y, "pgd-2-3-largest", Threat("linf", 0.1))
    torch.testing.assert_close(found, last, rtol=0, atol=1e-12)


def test_the_smallest_distance_to_a_target_is_the_largest_loss() -> None:
    model, (x, _) = small_net(), images(COUNT)
    target = model(x).topk(2).indices[:, 1]
    options = {"eps": 0.05, "targeted": True, "seed": SEED}
    runs = [
        attack(model, x, target, "pgd-3", **options, start=start - x)
        for start in (
            kernels.linf_start(x, 0.05, torch.arange(COUNT), SEED, run, stream=STREAM)
            for run in range(4)
        )
    ]
    losses = torch.stack(
        [nn.functional.cross_entropy(model(z), target, reduction="none") for z in runs]
    )
    nearest = losses.argmin(0)
    expected = torch.stack(runs)[nearest, torch.arange(COUNT)]
    found = attack(model, x, target, "pgd-3-4-largest", **options)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
    threat = Threat("linf", 0.05, targeted=True)
    _, found, fooled = by_search(model, x, target, "pgd-3-4-largest", threat)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
    assert fooled.tolist() == (model(expected).argmax(1) == target).tolist()
    assert len(set(nearest.tolist())) == 4


def test_a_criterion_says_which_run_is_the_largest() -> None:
    model, (x, y) = small_net(), images(COUNT)

    def criterion(logits: Tensor, y: Tensor) -> Tensor:
        return -logits[:, 0]

    options = {"eps": 0.05, "criterion": criterion}
    lowest = [
        model(attack(model, x, y, name, **options))[:, 0]
        for name in ("pgd-3", "pgd-3-2-largest", "pgd-3-4-largest")
    ]
    assert (lowest[1] <= lowest[0]).all()
    assert (lowest[2] <= lowest[1]).all()
    assert (lowest[2] < lowest[0]).any()


def test_a_given_start_is_clipped_or_not() -> None:
    model, (x, y) = small_net(), images(COUNT)
    start = torch.full_like(x, 0.05)
    bright = x.clone()
    bright[:, 0] = 1.0
    seen: list[float] = []
    model.register_forward_pre_hook(lambda module, args: seen.append(float(args[0].detach().max())))
    for name, highest in (("pgd-1", 1.0), ("pgd-1-unclipped", 1.05)):
        seen.clear()
        found = attack(model, bright, y, name, eps=0.05, start=start)
        assert max(seen) == pytest.approx(highest, abs=1e-12)
        assert found.max() <= 1


@pytest.mark.parametrize("seen", [30, 60, 120])
def test_an_interrupted_choice_among_runs_ends_as_one_that_was_not(seen: int) -> None:
    """The runs of an image before are forgotten with what they found, and made again."""
    model, x, y = labelled()
    name, options = "pgd-3-4-largest", {"eps": 0.06, "norm": "linf", "alpha": None, "seed": SEED}
    pairs = list(zip(x.split(5), y.split(5), strict=True))

    def between(tally: Tally) -> None:
        if sum(each.seen for p in tally.pipelines.values() for each in p.engines) > seen:
            raise Halt

    whole = verdicts_of(model, pairs, [name], **options)
    part = verdicts_of(model, pairs, [name], **options, between=between)
    assert part.halted
    assert (part.ledgers[name].rows["runs"] > 0).any()
    rest = verdicts_of(model, pairs, [name], **options, done=part)
    for column in ("fooled_by", "margin", "strength"):
        expected = torch.from_numpy(whole.ledgers[name].rows[column].astype(float))
        own = torch.from_numpy(rest.ledgers[name].rows[column].astype(float))
        torch.testing.assert_close(own, expected, rtol=1e-6, atol=1e-6)


def test_the_margin_attack_has_ten_steps_and_the_hinge_a_hundred() -> None:
    model, x, y = labelled()
    for name, steps in (("cw-margin", 10), ("cw", 100), ("pgd", 10)):
        usual = attack(model, x[:4], y[:4], name, eps=0.01)
        assert torch.equal(usual, attack(model, x[:4], y[:4], f"{name}-{steps}", eps=0.01))
        names = [name, f"{name}-{steps}"]
        (one, other) = stages_of(parse_attack("+".join(names)), Threat(), 0, 5, again=False)
        assert one.search.steps == other.search.steps == steps


class Coarse(nn.Module):
    """A network whose logits are those of ``net`` with an error, as in a low precision."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.net(x)
        return logits + 0.3 * (40 * logits.detach()).sin()


@pytest.mark.parametrize("fixed", [False, True])
def test_the_largest_loss_of_a_lower_precision_is_judged_by_the_network_itself(
    fixed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also of images that are wrong without an attack, which have no point to judge after the first
    run."""
    fixed_or_not(monkeypatch, fixed)
    model, x, y = labelled()
    networks = [Network(each, x.device, Runner()) for each in (model, Coarse(model))]
    pictures = Images(x, y, torch.arange(COUNT), model(x).detach())
    rows = cascade.entering(pictures, pictures.index, targeted=False, spares=False)
    search = Pgd(Threat("linf", 0.06), SEED, 3, 3, largest=True)
    with Passes(*networks) as passes:
        found = joined(cascade.run([Stage(search)], iter([rows]), passes, 6))
    order = found["place"].argsort()
    point, fooled = found["found"][order], found["fooled"][order]
    wrong = model(point).argmax(1) != y
    assert fooled.tolist() == wrong.tolist()
    assert (found["segment"] == 0).all()  # for the next search
    assert ((point - x).flatten(1).abs().amax(1) > 0).all()


@pytest.mark.parametrize(
    ("name", "stopped", "largest", "unclipped"),
    [
        ("pgd-10-5-largest", False, True, False),
        ("pgd-dlr-10-5-stopped-largest", True, True, False),
        ("PGD-20-Unclipped", False, False, True),
        ("pgd-unclipped", False, False, True),
        ("cw-20-3-unclipped-largest", False, True, True),
        ("cw-margin-10-10-largest", False, True, False),
        ("pgd-10-1-largest", False, True, False),
    ],
)
def test_a_name_carries_its_form(name: str, stopped: bool, largest: bool, unclipped: bool) -> None:
    spec = parse_attack(name)
    assert (spec.stopped, spec.largest, spec.unclipped) == (stopped, largest, unclipped)
    (part,) = parse_attack(f"{name}+square").parts[:1]
    assert (part.stopped, part.largest, part.unclipped) == (stopped, largest, unclipped)


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        (
            "pgd-largest",
            "no number of restarts among which to choose: write it as pgd-10-5-largest",
        ),
        ("cw-20-largest", "write it as cw-10-5-largest, or omit 'largest'"),
        ("pgd-20-stopped-unclipped", "outside of the range of images: omit 'stopped' or"),
        ("pgd-20-2-smallest", "behind the numbers may be: stopped, largest, unclipped"),
        ("pgd-20-2-largest-largest", "behind the numbers may be"),
        ("pgd-largest-20-2", "behind the numbers may be"),
        ("pgd--unclipped", "pgd-STEPS"),
        ("cw-margin-20-unclipped", "behind the numbers may be: largest"),
        ("cw-margin-20-stopped", "behind the numbers may be: largest"),
        ("apgd-ce-20-2-largest", "such as apgd-ce-100 or apgd-ce-100-2[.]"),
        ("fgsm-unclipped", "takes no number"),
    ],
)
def test_a_form_that_cannot_be_is_refused_in_one_sentence(name: str, sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        parse_attack(name)
