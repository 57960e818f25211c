"""``fastadv evaluate`` of a network from elsewhere: its numbers, its line, its refusals."""

from __future__ import annotations

import json
import signal
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import foreign_nets
import pytest
import rich.console
import torch
from torch import Tensor, nn

import fastadv
from fastadv.errors import UserError
from fastadv.run.console import Console
from fastadv.run.eval_pass import EvaluationStopped
from fastadv.run.foreign import Foreign, evaluate_foreign, load_foreign
from fastadv.run.request import RunRequest

State = dict[str, Tensor]

pytestmark = pytest.mark.filterwarnings("ignore:The network classifies")


class Elsewhere(nn.Module):
    """The Wide ResNet of ``tests/foreign_nets.py`` as somebody's own module."""

    def __init__(self, state: State, mean: Any = 0.0, std: Any = 1.0) -> None:
        super().__init__()
        self.weights = {name: value.float() for name, value in state.items()}
        self.mean, self.std = (torch.as_tensor(v).view(-1, 1, 1) for v in (mean, std))
        self.one = nn.Parameter(torch.ones(()))

    def forward(self, x: Tensor) -> Tensor:
        scaled = self.one * (x - self.mean) / self.std
        return foreign_nets.wide_resnet_logits(self.weights, scaled)


def wide() -> State:
    return foreign_nets.wide_resnet(10, 1)


def saved(state: State, folder: Path) -> str:
    torch.save({"state_dict": state}, folder / "weights.pt")
    return str(folder / "weights.pt")


def load(state: State, folder: Path, **request: Any) -> Foreign:
    settings = {"model": "wide_resnet28_10", "data": "synthetic", **request}
    return load_foreign(saved(state, folder), RunRequest(**settings))


def accuracies(out: str) -> dict[str, str]:
    """The accuracies in the printed table."""
    rows = [line.strip("│ ").split("│") for line in out.splitlines() if line.startswith("│")]
    return {row[0].strip(): row[1].strip() for row in rows}


def test_the_command_gives_the_accuracy_of_the_code_elsewhere(
    tmp_path: Path, fastadv_command: Any
) -> None:
    file = saved(wide(), tmp_path)
    words = ("evaluate", "--model", "wide_resnet34_10", "--weights", file, "--data", "synthetic")
    words = (*words, "--limit", 40, "--attacks", "clean,fgsm", "--eps", "2/255")
    done = fastadv_command(*words)
    assert done.code == 0, done.err
    test = load(wide(), tmp_path).data.test.limited(40)
    expected = fastadv.evaluate(Elsewhere(wide()), test, ("clean", "fgsm"), eps=2 / 255)
    assert accuracies(done.out) == {name: f"{100 * value:.2f}" for name, value in expected.items()}
    line = done.out.splitlines()[0]
    assert line.startswith(f"{file}: wide_resnet34_10, width 1, depth 10, ")
    assert "names of other code; pixels go in as they are, from 0 to 1 (--normalize: " in line

    again = fastadv_command(*words)
    assert "evaluated before: clean, fgsm" in again.out
    assert accuracies(again.out) == accuracies(done.out)
    records = (Path(f"{file}.evaluations") / "evaluations.jsonl").read_text().splitlines()
    assert [json.loads(line)["attack"] for line in records] == ["clean", "fgsm"]


def test_three_scalings(tmp_path: Path) -> None:
    """None, that of the data (``--normalize``), that in the file; the line says which."""
    x = torch.rand(4, 3, 32, 32)
    plain = load(wide(), tmp_path)
    of_data = load(wide(), tmp_path, normalize=True)
    mean, std = torch.tensor([0.4, 0.5, 0.6]), torch.tensor([0.2, 0.3, 0.25])
    numbers = {"mu": mean.view(1, 3, 1, 1), "sigma": std.view(1, 3, 1, 1)}
    in_file = load(wide() | numbers, tmp_path)
    data = of_data.data
    for found, scale, said, kept in [
        (plain, (), "pixels go in as they are", False),
        (of_data, (data.mean, data.std), "scaled by the mean and deviation of synthetic", True),
        (in_file, (mean, std), "scaled by the mean and deviation in the file", True),
    ]:
        expected = Elsewhere(wide(), *scale)(x)
        torch.testing.assert_close(found.model(x), expected, rtol=1e-4, atol=1e-4)
        assert said in found.said
        assert found.config.normalize is kept
    with pytest.raises(UserError, match="has its own mean and deviation of the pixels"):
        load(wide() | numbers, tmp_path, normalize=True)


def test_the_form_of_a_shortcut_is_said(tmp_path: Path) -> None:
    state = foreign_nets.preact_resnet18(2)
    x = torch.rand(2, 3, 32, 32)
    for given, form in [({}, "preact"), ({"shortcut": "raw"}, "raw")]:
        found = load(state, tmp_path, model="preact_resnet18", **given)
        assert f"preact_resnet18, shortcut {form}, width 2, " in found.said
        expected = foreign_nets.preact_resnet18_logits(
            {name: value.float() for name, value in state.items()}, x, form
        )
        torch.testing.assert_close(found.model(x), expected, rtol=1e-4, atol=1e-4)
        assert found.config.shortcut == form


def test_the_threat_is_the_usual_one_of_the_data(tmp_path: Path) -> None:
    assert load(wide(), tmp_path).config.eps == pytest.approx(8 / 255)
    assert load(wide(), tmp_path, norm="l2").config.eps == pytest.approx(128 / 255)
    grey = foreign_nets.preact_resnet18(2)
    grey["conv1.weight"] = grey["conv1.weight"][:, :1]
    assert load(grey, tmp_path, model="preact_resnet18", data="digits").config.eps == 0.2


OWN = """
import torch

class Own(torch.nn.Module):
    def __init__(self, num_classes, width=3):
        super().__init__()
        self.first = torch.nn.Conv2d(3, width, 3)
        self.last = torch.nn.Linear(width, num_classes)

    def forward(self, x):
        return self.last(self.first(x).relu().mean((2, 3)))
"""


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[type[nn.Module]]:
    (tmp_path / "own_network.py").write_text(OWN)
    monkeypatch.syspath_prepend(tmp_path)
    space: dict[str, Any] = {}
    exec(OWN, space)
    yield space["Own"]
    sys.modules.pop("own_network", None)


@pytest.mark.parametrize("normalize", [False, True])
def test_a_network_of_ones_own(own: type[nn.Module], normalize: bool, tmp_path: Path) -> None:
    model = own(10, width=5)
    torch.save({f"module.{n}": v for n, v in model.state_dict().items()}, tmp_path / "w.pth")
    request = RunRequest(
        model="own_network:Own", data="synthetic", width=5, normalize=normalize or None
    )
    found = load_foreign(str(tmp_path / "w.pth"), request)
    x, data = torch.rand(2, 3, 32, 32), found.data
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (data.mean, data.std))
    expected = model((x - mean) / std if normalize else x)
    torch.testing.assert_close(found.model(x), expected)
    evaluate_foreign(found, "clean", limit=20)


@pytest.mark.parametrize("name", ["torchvision:shufflenet_v2_x0_5", "timm:resnet10t"])
def test_a_network_of_a_library(name: str, tmp_path: Path) -> None:
    model = fastadv.build_model(name, num_classes=10).eval()
    found = load(model.state_dict(), tmp_path, model=name)
    x = torch.rand(2, 3, 32, 32)
    torch.testing.assert_close(found.model(x), model(x))


class Stopping(Console):
    """Ctrl-C after so many images of FGSM."""

    def __init__(self, images: int) -> None:
        super().__init__(rich.console.Console(quiet=True))
        self._images = images

    @contextmanager
    def evaluating(
        self, title: str, attack: str, done: int, total: int
    ) -> Iterator[Callable[..., None]]:
        def tick(images: int, *_: Any) -> None:
            if attack == "fgsm" and images >= self._images:
                signal.raise_signal(signal.SIGINT)

        yield tick


def test_an_interrupted_evaluation_continues(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fastadv.run.source.from_memory.eval_batch_size", lambda device, values: 10)
    with pytest.raises(EvaluationStopped, match="fgsm: 20 of 40 images"):
        evaluate_foreign(load(wide(), tmp_path), "clean,fgsm", limit=40, console=Stopping(20))
    found = load(wide(), tmp_path)
    scores = evaluate_foreign(found, "clean,fgsm", limit=40)
    assert scores.stored == ["clean"]
    images = found.data.test.limited(40)
    expected = fastadv.evaluate(Elsewhere(wide()), images, ("clean", "fgsm"))
    assert dict(scores) == dict(expected)


def test_little_more_than_chance_warns_once_and_a_trained_network_does_not(tmp_path: Path) -> None:
    found = load(wide(), tmp_path)
    with pytest.warns(UserWarning, match=r"classifies \d+.\d % of the images .* chance 10.0 %"):
        evaluate_foreign(found, "clean", limit=100)

    class Right(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.size = nn.Parameter(torch.tensor(3.0))

        def forward(self, x: Tensor) -> Tensor:
            return self.size * nn.functional.one_hot(labels[: len(x)], 10)

    labels = torch.cat([y for _, y in found.data.test.limited(20)])
    (tmp_path / "right").mkdir()
    folder = type(found.folder)(tmp_path / "right")
    right = Foreign(found.config, found.data, Right(), folder, "")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", message=".*(zero|probabilities|saturated)")
        assert evaluate_foreign(right, "clean", limit=20)["clean"] == 1


THIS = ("--weights", "weights.pt", "--model", "wide_resnet28_10", "--data", "synthetic")
MISTAKES: dict[str, tuple[tuple[str, ...], str]] = {
    "neither": ((), "Name a run folder, or a network from elsewhere"),
    "no weights": (("--model", "vgg16"), "(given: --model)"),
    "no data": (("--weights", "w.pt", "--model", "vgg16"), "(given: --weights, --model)"),
    "both": (("runs/x", "--model", "vgg16"), "omit --model, or the folder."),
    "which": (("--weights", "w.pt", "--data", "digits", "--which", "last"), "--which"),
    "no file": (("--model", "vgg16", "--weights", "w.pt", "--data", "digits"), "There is no file"),
    "no name": (("--weights", "weights.pt", "--data", "synthetic"), "which network its weights"),
    "a misspelt name": (
        ("--weights", "weights.pt", "--model", "wide_resnet", "--data", "synthetic"),
        "did you mean 'wide_resnet",
    ),
    "channels": (
        ("--weights", "weights.pt", "--model", "wide_resnet28_10", "--data", "digits"),
        "is of a network for 3 channels, and digits has 1",
    ),
    "width": (
        (*THIS, "--width", "2"),
        "lacks 'block1.0.shortcut.0.weight'",
    ),
    "an attack": (
        (*THIS, "--attacks", "pdg-10"),
        "pgd",
    ),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_one_sentence(name: str, tmp_path: Path, fastadv_command: Any) -> None:
    saved(wide(), tmp_path)
    words, hint = MISTAKES[name]
    done = fastadv_command("evaluate", *words)
    assert done.code == 2
    assert hint in done.err
    assert len(done.err.strip().splitlines()) == 1
    assert not (tmp_path / "weights.pt.evaluations").exists()


def test_classes_must_be_those_of_the_data(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is of a network for 7 classes, and synthetic has 10"):
        load(foreign_nets.wide_resnet(10, 1, classes=7), tmp_path)
