"""FAB and FAB-T: every point of the published code, and results that depend on no other image."""

import pytest
import torch
from pyautoattack.fab_pt import FABAttack_PT
from torch import nn

from fastadv import kernels
from fastadv.engine.noise import RESTART
from fastadv.evaluation.attacks import attack
from fastadv.evaluation.attacks.inputs import attacked_network
from fastadv.evaluation.search.engine import Engine, waiting
from fastadv.evaluation.search.fab import START, Fab, FabT
from fastadv.evaluation.search.fixed import FixedEngine
from fastadv.evaluation.search.passes import Passes
from fastadv.evaluation.search.rows import joined
from fastadv.evaluation.search.search import Images
from fastadv.threat import Threat

PUBLISHED_NORM = {"linf": "Linf", "l2": "L2"}
SMALL = [(1, 5, 1), (3, 4, 5)]  # channels, classes, images


def problem(channels, classes, count):
    """A smooth float64 network, images (count,channels,7,7) with many pixels at the ends of the
    box, and the classes that the network gives them."""
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(channels, 6, 3),
        nn.Softplus(),
        nn.Conv2d(6, 8, 3, stride=2),
        nn.Softplus(),
        nn.Flatten(),
        nn.Linear(32, classes),
    ).double()
    x = (torch.rand(count, channels, 7, 7).double() * 1.4 - 0.2).clamp(0, 1)
    with torch.no_grad():
        net[-1].weight.mul_(10)
        # So that images are of several classes, and some near to other classes.
        net[-1].bias.sub_(net(torch.rand(64, channels, 7, 7).double()).mean(0))
        return net, x, net(x).argmax(1)


def run(search, net, x, y, slots, index=None, engine=Engine):
    """The rows that ``search`` yields, in the order of the images, and its passes."""
    passes = Passes(attacked_network(net, torch.device("cpu"), False))
    place = torch.arange(len(x))
    with passes:
        images = Images(x, y, place if index is None else index, passes.logits(x))
        passes.forwards = 0
        rows = waiting(images, place, targeted=search.threat.targeted)
        rows = joined(engine(search, passes, slots).run(iter([rows])))
    order = rows["place"].argsort()
    return {name: values[order] for name, values in rows.items()}, passes


class Replayed(FixedEngine):
    """An engine whose steps are recorded: a replay stays in the phase of its recording."""

    def __init__(self, search, passes, slots):
        super().__init__(search, passes, slots)
        passes.recorder = self

    def warm_up(self, step):
        step()

    def __call__(self, step):
        phase = self.phase

        def replay():
            now, self.phase = self.phase, phase
            counted = self.passes.forwards, self.passes.backwards
            step()
            self.passes.forwards, self.passes.backwards = counted
            self.phase = now

        step()
        return None, replay


class Recorded(FABAttack_PT):
    """The published attack with the points of each run: ``paths[run][iteration]`` (n,...)."""

    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        self.paths = []

    def attack_single_run(self, *args, **options):
        self.paths.append([])
        result = super().attack_single_run(*args, **options)
        self.paths[-1] = self.paths[-1][1:]  # the first one is the image
        return result

    def _get_predicted_label(self, x):
        if self.paths:
            self.paths[-1].append(x.clone())
        return super()._get_predicted_label(x)


def in_float64(monkeypatch):
    """The published code computes in float64 from here on."""
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)
    zeros, ones = torch.zeros, torch.ones
    for name, made in (("zeros", zeros), ("ones", ones)):
        monkeypatch.setattr(
            torch, name, lambda *a, made=made, **o: made(*a, **{"dtype": torch.float64, **o})
        )
    full = torch.full_like
    monkeypatch.setattr(torch, "full_like", lambda t, v, **o: full(t.double(), v, **o))


def with_our_draws(monkeypatch):
    """The published code draws the noise of our run number ``[0]`` of the list that is returned,
    for images 0, 1, ..."""
    number = [0]

    def drawn(kind, shape):
        key = (0, START.shift + number[0] * RESTART, START.number)
        return kind(torch.arange(shape[0]), tuple(shape[1:]), *key, torch.float64)

    monkeypatch.setattr(torch, "rand", lambda s: (drawn(kernels.noise_uniform, s) + 1) / 2)
    monkeypatch.setattr(torch, "randn", lambda s: drawn(kernels.noise_normal, s))
    return number


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("kind", [Fab, FabT])
@pytest.mark.parametrize("shape", SMALL)
def test_every_point_is_that_of_the_published_code(norm, kind, shape, monkeypatch):
    net, x, y = problem(*shape)
    classes, steps, eps = shape[1], 40, 0.1
    segments = 3 if kind is Fab else classes - 1
    search = kind(Threat(norm, eps), 0, segments, steps)
    # So that no run ends early: the published code goes on, and so do all of its points.
    monkeypatch.setattr(search, "counts", lambda state: torch.zeros_like(state["settled"]))
    ours = {}
    tell = search.tell

    def recorded(state, seen):
        for i in (~state["settled"]).nonzero()[:, 0].tolist():
            key = tuple(int(state[name][i]) for name in ("segment", "iteration", "index"))
            ours[key] = state["point"][i].clone()
        return tell(state, seen)

    monkeypatch.setattr(search, "tell", recorded)
    run(search, net, x, y, slots=3)
    in_float64(monkeypatch)
    options = {"n_iter": steps, "eps": eps, "norm": PUBLISHED_NORM[norm], "device": "cpu"}
    theirs, draws = Recorded(net, **options), with_our_draws(monkeypatch)
    for number in range(segments):
        draws[0], theirs.target_class = number, number + 2
        begins = {"is_targeted": True} if kind is FabT else {"use_rand_start": number > 0}
        theirs.attack_single_run(x, y, **begins)
    assert len(ours) == segments * steps * len(x)
    for (segment, iteration, image), point in ours.items():
        expected = theirs.paths[segment][iteration - 1][image]
        assert (point - expected).abs().max() < 1e-12
    assert (theirs.paths[0][-1] - x).abs().max() > 0.01


@pytest.mark.parametrize(("norm", "eps"), [("linf", 0.02), ("l2", 0.13)])
@pytest.mark.parametrize("kind", [Fab, FabT])
def test_it_fools_the_network_where_the_published_code_does(norm, eps, kind, monkeypatch):
    net, x, y = problem(3, 5, 40)
    search = kind(Threat(norm, eps), 0, 4 if kind is FabT else 1, 20)
    rows, _ = run(search, net, x, y, slots=16)
    found, fooled = rows["found"], rows["fooled"]
    assert torch.equal(net(found).argmax(1) != y, fooled)
    assert found.min() >= 0
    assert found.max() <= 1
    away = (found - x).flatten(1)
    assert ((away.abs().amax(1) if norm == "linf" else away.norm(dim=1)) <= eps).all()
    in_float64(monkeypatch)
    options = {"n_iter": 20, "eps": eps, "norm": PUBLISHED_NORM[norm], "device": "cpu"}
    published = FABAttack_PT(net, targeted=kind is FabT, n_target_classes=4, **options)
    theirs = net(published.perturb(x, y)).argmax(1) != y
    assert torch.equal(fooled, theirs)
    assert 5 < fooled.sum() < 35


@pytest.mark.parametrize("kind", [Fab, FabT])
def test_a_result_depends_on_no_other_image(kind):
    net, x, y = problem(2, 4, 9)
    threat = Threat("linf", 0.02)
    index = torch.tensor([5, 2, 70, 11, 3, 8, 0, 40, 6])
    search = kind(threat, 1, 3, 12)
    whole, _ = run(search, net, x, y, 9, index)
    assert 0 < whole["fooled"].sum() < 9
    for slots in (1, 3, 7):
        rows, _ = run(search, net, x, y, slots, index)
        assert torch.equal(rows["fooled"], whole["fooled"])
        torch.testing.assert_close(rows["found"], whole["found"], rtol=0, atol=1e-12)
        torch.testing.assert_close(rows["margin"], whole["margin"], rtol=0, atol=1e-10)
    for engine in (FixedEngine, Replayed):
        rows, passes = run(search, net, x, y, 4, index, engine)
        torch.testing.assert_close(rows["found"], whole["found"], rtol=0, atol=1e-12)
        assert passes.backwards == passes.forwards / 2 * (3 if kind is Fab else 1)
    turned = torch.arange(8, -1, -1)
    rows, _ = run(search, net, x[turned], y[turned], 3, index[turned])
    torch.testing.assert_close(rows["found"][turned], whole["found"], rtol=0, atol=1e-12)


def test_restarts_begin_at_points_of_their_own_half_way_to_the_surface():
    _, x, y = problem(2, 4, 3)
    x = 0.3 + 0.4 * x  # off the ends of the box
    index = torch.tensor([4, 9, 4])
    for norm in ("linf", "l2"):
        search = Fab(Threat(norm, 0.2), segments=3)
        images = Images(x, y, index, torch.zeros(3, 4).double())
        points = [search.start(images, segment)["point"] for segment in range(3)]
        assert torch.equal(points[0], x)
        for point in points[1:]:
            away = (point - x).flatten(1)
            size = away.abs().amax(1) if norm == "linf" else away.norm(dim=1)
            torch.testing.assert_close(size, torch.full_like(size, 0.1))
        moves = [point - x for point in points[1:]]
        torch.testing.assert_close(moves[0][0], moves[0][2])
        assert not torch.allclose(moves[0][0], moves[0][1])
        assert not torch.allclose(moves[0], moves[1])


@pytest.mark.parametrize("kind", [Fab, FabT])
def test_an_iteration_takes_two_forward_passes_and_a_gradient(kind):
    net, x, y = problem(1, 5, 7)
    search = kind(Threat("linf", 1e-6), 0, 2, 10)
    _, passes = run(search, net, x, y, slots=3)
    iterations = 7 * 2 * 10
    assert passes.forwards == 2 * iterations
    assert passes.backwards == iterations * (4 if kind is Fab else 1)


def test_no_batch_is_split_when_images_come_and_go(monkeypatch):
    net, x, y = problem(3, 5, 17)
    y[::4] = (y[::4] + 1) % 5  # they leave after their first pass
    search = FabT(Threat("linf", 0.02), 0, 2, 6)
    kinds = []
    tell = search.tell

    def checked(state, seen):
        kinds.append({*state["settled"].tolist()})
        assert kinds[-1] == {seen.steep}
        return tell(state, seen)

    monkeypatch.setattr(search, "tell", checked)
    run(search, net, x, y, slots=4)
    assert {True} in kinds
    assert {False} in kinds


def test_with_targets_fab_goes_to_the_boundary_of_the_target():
    net, x, y = problem(3, 5, 12)
    targets = (y + 2) % 5
    rows, passes = run(Fab(Threat("linf", 0.1, targeted=True), steps=30), net, x, targets, 4)
    assert 3 < rows["fooled"].sum() < 12
    assert torch.equal(net(rows["found"]).argmax(1) == targets, rows["fooled"])
    assert passes.backwards < passes.forwards


@pytest.mark.parametrize("name", ["fab-5", "fab-5-2", "fab-t-10", "fab-t-10-3"])
def test_it_is_an_attack_by_name(name):
    net, x, y = problem(3, 5, 10)
    x_adv = attack(net, x, y, name, eps=0.05)
    fooled = net(x_adv).argmax(1) != y
    assert fooled.any()
    assert (x_adv - x).abs().max() <= 0.05
