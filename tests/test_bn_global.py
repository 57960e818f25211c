"""Processes with parts of a batch compute the update of one with all of it (``bn="global"``), up to
rounding in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from divided import (
    COUNTS,
    distance,
    everything,
    in_processes,
    join,
    part,
    results,
    train,
    trained,
    uneven,
)
from every_recipe import arguments, call, step_of
from tiny import tiny_batch, tiny_model, tiny_step
from tiny_staged import recorded, staged_model
from torch import Tensor, nn
from torch.nn import functional

from fastadv.algorithms.recipes.table import METHODS
from fastadv.algorithms.resolution import resolve
from fastadv.engine.model.whole_norm import whole_statistics
from fastadv.engine.process.distributed import leave
from fastadv.engine.process.division import Division
from fastadv.errors import TrainingError, UserError
from fastadv.evaluation.accuracy import evaluate
from fastadv.models import build_model
from fastadv.run.other_processes import taken_over
from fastadv.training.divided import division_of
from fastadv.training.settings import Execution
from fastadv.training.training_step import Step

NEAR = 1e-10
# A second derivative, noise inside the blocks, features, perturbed weights, sums over an epoch.
QUICK = ("gradalign", "apart", "fgsm-fuap", "trades-rwp", "ikl")


@pytest.mark.slow
@pytest.mark.parametrize("first", range(0, len(METHODS), 15))
def test_two_processes_train_as_one(first: int, tmp_path: Any) -> None:
    methods = list(METHODS)[first : first + 15]
    assert_as_one(2, methods, tmp_path)


@pytest.mark.long
@pytest.mark.parametrize("world", [2, 4])
def test_every_recipe_trains_as_in_one_process(world: int, tmp_path: Any) -> None:
    assert_as_one(world, list(METHODS), tmp_path)


def assert_as_one(world: int, methods: list[str], folder: Any) -> None:
    far = {}
    for rank, found in enumerate(results(world, methods, str(folder / "trained"))):
        for method in methods:
            assert not isinstance(found[method], str), f"{method}, process {rank}: {found[method]}"
            away = distance(found[method], trained(method, 0, 1))
            if away > NEAR:
                far[method, rank] = away
    assert not far


# -- in this process ------------------------------------------------------------------------------


def test_what_cannot_look_into_every_pass_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fastadv.engine.process.distributed.world_size", lambda: 2)
    with pytest.raises(UserError, match="mode='compiled' does not do with several processes"):
        tiny_step(tiny_model(), "pgd", mode="compiled", bn="global")
    compiled = tiny_model()
    compiled._compiled_call_impl = compiled.forward  # type: ignore[assignment]  # as compile() does
    for model in (nn.Sequential(torch.jit.ScriptModule()), compiled):
        with pytest.raises(UserError, match=r"torch\.compile or TorchScript has"):
            division_of(Execution("eager", bn="global"), model)
    with pytest.raises(UserError, match="bn='global' synchronises every BatchNorm"):
        tiny_step(odd_model(), "pgd")
    with pytest.raises(UserError, match="bn 'sync'"):
        tiny_step(tiny_model(), "pgd", bn="sync")


def test_rows_of_places_are_divided_anew() -> None:
    """Free's perturbation, for three processes in place of two; of a mean they take the first's."""
    plan = resolve("free")
    states = [{"delta": torch.arange(6.0)[rows]} for rows in (slice(0, 3), slice(3, 6))]
    found = [taken_over(plan, states, rank, 3) for rank in range(3)]
    assert [own["delta"].tolist() for own, _ in found] == [[0, 1], [2, 3], [4, 5]]
    assert all(not told for _, told in found)
    assert taken_over(plan, states, 1, 2) == (states[1], [])
    kept = [{"convergence": torch.tensor([rank])} for rank in range(2)]
    own, told = taken_over(resolve("fgsm-rs-cs"), kept, 1, 4)
    assert own["convergence"].tolist() == [0]
    assert told == [
        "each of the 2 processes of this run kept its own convergence: all 4 go on with that of "
        "the first."
    ]


# -- models from elsewhere, and an error in one process ------------------------------------------


def foreign(name: str, rank: int, world: int) -> dict[str, Tensor]:
    torch.manual_seed(6)
    model = build_model(name, num_classes=4, in_channels=3).double()
    step = tiny_step(model, "trades", bn="global", steps=1, eps=0.02)
    images = torch.rand(6, 3, 32, 32, generator=torch.Generator().manual_seed(1)).double()
    for _ in range(2):
        rows = uneven(6, rank, world)
        step(images[rows], torch.arange(6)[rows] % 4, torch.arange(6)[rows])
    return everything(step)


def foreigners(rank: int, world: int, at: int, out: str) -> None:
    join(rank, world, at)
    torch.save({name: foreign(name, rank, world) for name in FOREIGN}, f"{out}.{rank}")
    leave()


FOREIGN = ("torchvision:resnet18", "timm:resnet10t")


@pytest.mark.slow
def test_models_from_elsewhere(tmp_path: Any) -> None:
    in_processes(foreigners, 2, str(tmp_path / "found"))
    for name in FOREIGN:
        whole = foreign(name, 0, 1)
        for rank in range(2):
            assert distance(torch.load(tmp_path / f"found.{rank}")[name], whole) < NEAR


def failing(rank: int, world: int, at: int, out: str) -> None:
    """An error in one process in the middle of its second call."""
    join(rank, world, at)
    model = tiny_model()
    step = tiny_step(model, "pgd", bn="global", steps=2)
    told: list[Any] = []

    def breaks(module: nn.Module, given: Any) -> None:
        if len(told) == 1 and rank:
            raise ValueError("broken here")

    model.bn2.register_forward_pre_hook(breaks)
    for update in range(4):
        x, y, index, _ = tiny_batch(6, seed=update)
        rows, before = uneven(6, rank, world), everything(step)
        try:
            step(x[rows], y[rows], index[rows])
            told.append("")
        except (ValueError, UserError, TrainingError) as error:
            told.append(str(error))
            assert distance(everything(step), before) == 0
    torch.save(told, f"{out}.{rank}")
    leave()


@pytest.mark.slow
def test_an_error_in_one_process_ends_the_others(tmp_path: Any) -> None:
    in_processes(failing, 2, str(tmp_path / "told"))
    first, second = (torch.load(tmp_path / f"told.{rank}") for rank in range(2))
    assert (first[0], second[:2]) == ("", ["", "broken here"])
    assert first[1].startswith("This process stops here because process 1 stopped")
    for sentence in (*first[2:], *second[2:]):
        assert "their messages no longer fit together" in sentence


# -- a few recipes and odd cases, in one group of two processes -----------------------------------


class Odd(nn.Module):
    """BatchNorm with all that it can be made with, in one, two and three dimensions."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, padding=1)
        self.average = nn.BatchNorm2d(4, momentum=None)
        self.plain = nn.BatchNorm2d(4, affine=False)
        self.still = nn.BatchNorm2d(4, track_running_stats=False)
        self.sync = nn.SyncBatchNorm(4)
        self.deep = nn.BatchNorm3d(2)
        self.flat = nn.BatchNorm1d(4)
        self.linear = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.average(self.conv(x)))
        x = torch.tanh(self.sync(self.still(self.plain(self.conv(x[:, :3])))))
        x = self.deep(x.unflatten(1, (2, 2))).flatten(1, 2)
        return self.linear(torch.tanh(self.flat(x.mean((2, 3)))))


def odd_model() -> nn.Module:
    torch.manual_seed(4)
    return Odd().double()


def odd(rank: int, world: int) -> dict[str, Tensor]:
    step = tiny_step(odd_model(), "trades", bn="global", steps=2)
    for update in range(3):
        x, y, index, _ = tiny_batch(6, seed=update)
        rows = uneven(6, rank, world)
        step(x[rows], y[rows], index[rows])
    return everything(step)


def few_images(rank: int, world: int) -> dict[str, Tensor]:
    """A batch of one image, which the other process has none of, and rows without an index."""
    found = {}
    for method in ("pgd", "gradalign"):
        step = tiny_step(tiny_model(), method, bn="global")
        for count in (4, 1, 4):
            x, y, _, _ = tiny_batch(count, seed=count)
            rows = uneven(count, rank, world)
            step(x[rows], y[rows])
        found |= {f"{method} {name}": value for name, value in everything(step).items()}
    return found


def accumulated(rank: int, world: int) -> dict[str, Tensor]:
    step = tiny_step(tiny_model(), "pgd", bn="global", steps=2)
    for update in range(4):
        given = dict(zip(("x", "y", "index"), tiny_batch(6, seed=update)[:3], strict=True))
        step(**part(given, uneven(6, rank, world)), update=update % 2 == 1)
    return everything(step)


def checkpointed(rank: int, world: int) -> dict[str, Tensor]:
    """A model whose backward pass computes its activations again."""
    model = tiny_model()
    inner = model.bn1.forward

    def forward(x: Tensor) -> Any:
        return torch.utils.checkpoint.checkpoint(inner, x, use_reentrant=False)

    model.bn1.forward = forward  # type: ignore[method-assign]
    step = tiny_step(model, "pgd", bn="global", steps=2)
    for update in range(2):
        given = dict(zip(("x", "y", "index"), tiny_batch(6, seed=update)[:3], strict=True))
        step(**part(given, uneven(6, rank, world)))
    return everything(step)


def averaged(rank: int, world: int) -> dict[str, Tensor]:
    """BatchNorm's statistics for averaged weights."""
    step = step_of("swa", staged_model(), epoch_length=2, bn="global", average_start=0)
    train(step, range(4), rank, world)
    images = []
    for update, count in enumerate((8, 5, 1)):
        x = tiny_batch(count, seed=update)[0]
        images.append(x[uneven(count, rank, world)])
    with step.evaluation_weights(images):
        return everything(step)


def resumed(rank: int, world: int) -> dict[str, Tensor]:
    """What two processes go on with from a state of one, over the second half of a run."""
    found = {}
    for method in ("atta-1", "free"):
        saved = torch.load(f"{FOLDER[0]}.{method}")
        first = step_of(method, staged_model(), epoch_length=2, bn="global")
        first.model.load_state_dict(saved["model"])
        first.optimizer.load_state_dict(saved["optimizer"])
        first.load_state_dict(saved["step"])
        train(first, range(4, 8), rank, world)
        assert not first.rank_local_state or world == 1
        found |= {f"{method} {name}": value for name, value in everything(first).items()}
    return found


FOLDER = [""]


def save_halves(folder: str) -> None:
    """Write the state of one process after the first half of some runs."""
    for method in ("atta-1", "free"):
        step = step_of(method, staged_model(), epoch_length=2, bn="global")
        train(step, range(4), 0, 1)
        saved = {"model": step.model.state_dict(), "optimizer": step.optimizer.state_dict()}
        torch.save(saved | {"step": step.state_dict()}, f"{folder}.{method}")


def evaluated(rank: int, world: int) -> dict[str, Tensor]:
    """Accuracies on an odd number of images, and on fewer than there are processes."""
    model = tiny_model().eval()
    found = {}
    for count in (5, 1):
        x, y, _, _ = tiny_batch(count, seed=3)
        batches = list(zip(x.split(2), y.split(2), strict=True))
        scores = evaluate(model, batches, ["clean", "pgd-3"], eps=0.1, shared=world > 1)
        assert scores.n == count
        found |= {f"{name} {count}": torch.tensor(score) for name, score in scores.items()}
    return found


def second_derivative(rank: int, world: int) -> dict[str, Tensor]:
    """Of BatchNorm alone, in both of its forms, for 5 images and for one."""
    found = {}
    for count, twice in ((5, False), (5, True), (1, False), (1, True)):
        draw = torch.Generator().manual_seed(count)
        x, a, b = (
            torch.randn(count, 3, 2, 2, generator=draw).double().requires_grad_() for _ in range(3)
        )
        weight, bias = (torch.rand(3, generator=draw).double().requires_grad_() for _ in range(2))
        if world == 1:
            y = functional.batch_norm(x, None, None, weight, bias, training=True)
        else:
            division = Division()
            with whole_statistics(division, twice=twice):
                own = division.own_rows(x)
                y = functional.batch_norm(own, None, None, weight, bias, training=True)
                y = division.all_rows(y, count)
        slope = torch.autograd.grad((y.tanh() * a).sum(), x, create_graph=True)[0]
        of_x, *others = torch.autograd.grad((slope.square() * b).sum(), [x, weight, bias])
        if world > 1:
            others = division.add_up(others, [weight, bias])
        name = f"{count} {twice}"
        found |= {f"{name} slope": slope.detach(), f"{name} x": of_x}
        found |= {f"{name} weight": others[0], f"{name} bias": others[1]}
    return found


def second_derivative_for_own_rows(rank: int, world: int) -> dict[str, Tensor]:
    """Of a value that all processes have and the rows of each use, for 5 images and for one. What
    is made of its gradient is the same in all processes, and so are both derivatives of that."""
    found = {}
    for count in (5, 1):
        draw = torch.Generator().manual_seed(count)
        x, a = (torch.randn(count, 3, generator=draw).double().requires_grad_() for _ in range(2))
        value = torch.randn(3, generator=draw).double().requires_grad_()
        if world == 1:
            y = (x * value).tanh()
        else:
            division = Division()
            own = division.own_rows(x)
            y = division.all_rows((own * division.for_own_rows(value)).tanh(), count)
        slope = torch.autograd.grad((y.square() * a).sum(), value, create_graph=True)[0]
        of = torch.autograd.grad((slope.square() * slope).sum(), [value, x, a])
        found |= {f"{count} slope": slope.detach()}
        found |= {f"{count} {n}": t for n, t in zip(("value", "x", "a"), of, strict=True)}
    return found


CASES = {
    "odd": odd,
    "second derivative for own rows": second_derivative_for_own_rows,
    "second derivative": second_derivative,
    "evaluated": evaluated,
    "few images": few_images,
    "accumulated": accumulated,
    "checkpointed": checkpointed,
    "averaged": averaged,
    "resumed": resumed,
} | {
    method: lambda rank, world, method=method: trained(method, rank, world, uneven, 2)
    for method in QUICK
}


def refused(rank: int) -> dict[str, str]:
    """What is told of calls that do not fit together, by both processes."""
    step = step_of("pgd", staged_model(), bn="global")
    told = {}
    given = arguments(step, 0)
    shapes = {"a shape": given["x"][..., : 6 - rank], "a type": given["x"]}
    if rank:
        shapes["a type"] = shapes["a type"].float()
    for name, x in shapes.items():
        try:
            step(**{**given, "x": x})
        except UserError as error:
            told[name] = str(error)
    for name, wrong in (("view", 3), ("eps", 0.1), ("index", torch.tensor(1))):
        try:
            step(**{**given, name: wrong})
        except UserError as error:
            told[name] = str(error)
    step(**given)
    return told


def noise() -> Tensor:
    """The perturbations (4,3,6,6) with which random starts begin, without an index."""
    step = tiny_step(tiny_model(), "fast", alpha=0.0)
    seen = recorded(step)
    x = torch.full((4, 3, 6, 6), 0.5, dtype=torch.float64)
    step(x, torch.arange(4))
    return seen[0].x_adv - x


EARLY: list[Step] = []


def called_in_a_group(steps: list[Step]) -> str:
    """What the first call of a step says that was built before the group."""
    try:
        call(steps[0], 0)
    except UserError as error:
        return str(error)
    return ""


def cases(rank: int, world: int, at: int, out: str) -> None:
    EARLY.append(step_of("pgd", staged_model(), bn="global"))
    join(rank, world, at)
    FOLDER[0] = out
    found: dict[str, Any] = {}
    for name, case in CASES.items():
        found[name] = case(rank, world)
    found["refused"] = refused(rank)
    found["early"] = called_in_a_group(EARLY)
    found["noise"] = noise()
    local = step_of("pgd", staged_model(), epoch_length=len(COUNTS))
    train(local, range(2), rank, world)
    found["local"] = everything(local)
    torch.save(found, f"{out}.{rank}")
    leave()


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    out = str(tmp_path_factory.mktemp("processes") / "found")
    save_halves(out)
    FOLDER[0] = out
    in_processes(cases, 2, out)
    return [torch.load(f"{out}.{rank}") for rank in range(2)]


@pytest.mark.parametrize("case", CASES)
def test_two_processes_compute_what_one_does(case: str, both: list[dict[str, Any]]) -> None:
    whole = CASES[case](0, 1)
    for found in both:
        assert distance(found[case], whole) < NEAR


def test_what_differs_between_processes_is_told_in_both(both: list[dict[str, Any]]) -> None:
    for found in both:
        for name in ("a shape", "a type"):
            assert "Process 1 gave its step other arguments" in found["refused"][name]
        assert found["refused"]["view"] == "view is a fastadv.View of the images, not 3."
        assert found["refused"]["eps"] == "eps must be a torch.Tensor, not float."
        assert found["refused"]["index"].startswith("index needs one row for each of the images x")
        assert "build it after torch.distributed.init_process_group" in found["early"]


def test_without_index_each_process_draws_its_own_noise(both: list[dict[str, Any]]) -> None:
    rows = torch.cat([found["noise"] for found in both]).flatten(1)
    assert len(rows.unique(dim=0)) == 8


def test_local_statistics_are_others(both: list[dict[str, Any]]) -> None:
    step = step_of("pgd", staged_model(), epoch_length=len(COUNTS))
    train(step, range(2), 0, 1)
    assert distance(both[0]["local"], everything(step)) > 1e-3
