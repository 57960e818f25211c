"""docs/models-from-elsewhere.md: its commands and its code are run."""

from __future__ import annotations

import importlib.util
import re
import shlex
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import foreign_nets
import pytest
import torch
from plugin_files import forgotten_after
from safetensors.torch import save_file

import fastadv
from fastadv.models import build_model
from fastadv.run.console import Console
from fastadv.run.foreign import _line
from fastadv.run.foreign_network import Network
from fastadv.run.request import RunRequest
from fastadv.run.train import train

PAGE = (Path(__file__).parents[1] / "docs" / "models-from-elsewhere.md").read_text("utf-8")
SMALL: dict[str, Any] = {"width": 2, "epochs": 1, "limit": 96, "batch_size": 32, "mode": "eager"}
SMALL |= {"select_attack": "fgsm", "test_attacks": "clean", "test_limit": 16, "method": "fast"}
# What a test has: data that are there, and a smaller network.
INSTEAD = {"cifar10": "synthetic", "torchvision:resnet18": "torchvision:shufflenet_v2_x0_5"}
OWN = """
import torch


class Own(torch.nn.Sequential):
    def __init__(self, num_classes):
        super().__init__(
            torch.nn.Conv2d(3, 4, 5, 4), torch.nn.Flatten(), torch.nn.LazyLinear(num_classes)
        )
        self(torch.zeros(1, 3, 32, 32))
"""

pytestmark = pytest.mark.filterwarnings("ignore:The network classifies")
has_onnx = importlib.util.find_spec("onnxruntime") is not None


def block(name: str) -> str:
    found = re.search(rf"<!-- {name} -->\n```\w*\n(.*?)```", PAGE, flags=re.S)
    assert found, f"the page has no block {name!r}"
    return found[1]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "rwp"
    train(RunRequest(**SMALL, out=str(out)), Console())
    return out


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The page's files, of small networks."""
    wide = {f"module.{n}": v for n, v in foreign_nets.wide_resnet(10, 1).items()}
    torch.save({"state_dict": wide}, tmp_path / "trades.pt")
    torch.save(foreign_nets.preact_resnet18(2), tmp_path / "awp.pt")
    library = build_model(INSTEAD["torchvision:resnet18"]).state_dict()
    save_file(library, tmp_path / "weights.safetensors")
    (tmp_path / "own_network.py").write_text(OWN)
    space: dict[str, Any] = {}
    exec(OWN, space)
    torch.save(space["Own"](10).state_dict(), tmp_path / "own.pth")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(tmp_path)
    with forgotten_after("own_network"):
        yield tmp_path


def test_the_commands_evaluate(files: Path, fastadv_command: Callable[..., Any]) -> None:
    lines = block("evaluate").splitlines()
    assert len(lines) == 4
    for line in lines:
        words = [INSTEAD.get(word, word) for word in shlex.split(line)[1:]]
        if "--attacks" not in words:
            words += ["--attacks", "clean,fgsm"]
        done = fastadv_command(*words, "--limit", 10)
        assert done.code == 0, (line, done.err)
        if "--normalize" in line:
            assert "shortcut raw" in done.out
            assert "scaled by the mean and deviation of synthetic" in done.out
    assert {path.name for path in files.glob("*.evaluations")} == {
        f"{name}.evaluations" for name in ("trades.pt", "awp.pt", "weights.safetensors", "own.pth")
    }


def test_the_line() -> None:
    with torch.device("meta"):
        model = build_model("wide_resnet34_10")
    options = {"width": 10, "depth": 34}
    found = Network(model, "wide_resnet34_10", options, renamed=True, scaled_by=None)
    assert block("line").strip() == _line("trades.pt", found, "cifar10")


def test_the_names_of_the_table() -> None:
    rows = re.findall(r"^\| (`(?:wide_resnet28|preact|resnet18)[^|]*) \| ([^|]*) \|", PAGE, re.M)
    states = {
        "wide_resnet28_10": foreign_nets.wide_resnet(10, 2),
        "preact_resnet18": foreign_nets.preact_resnet18(2),
        "resnet18": foreign_nets.resnet18(2) | foreign_nets.resnet18(2, torchvision=True),
    }
    assert len(rows) == 3
    for networks, said in rows:
        state = states[re.findall(r"`(\w+)`", networks)[0]]
        names = re.findall(r"`([\w.]+)`", said)
        assert names
        for name in names:
            assert any(key.startswith(f"{name}.") for key in state), name


def test_the_python(files: Path) -> None:
    batches = [(torch.rand(4, 3, 32, 32), torch.arange(4))]
    space: dict[str, Any] = {"fastadv": fastadv, "batches": batches}
    space |= {"mean": [0.4, 0.5, 0.6], "std": [0.2, 0.2, 0.2]}
    exec(compile(block("python"), "models-from-elsewhere.md", "exec"), space)
    assert space["scores"].n == 4
    assert space["other"].layer2[0].projects_raw
    assert space["other"].normalize.mean.flatten().tolist() == pytest.approx([0.4, 0.5, 0.6])


@pytest.fixture
def written(run: Path, tmp_path: Path, fastadv_command: Any) -> Callable[[str], None]:
    """Runs the page's command that writes a file with this suffix."""
    shutil.copytree(run, tmp_path / "runs" / "rwp")

    def write(suffix: str) -> None:
        (line,) = (line for line in block("export").splitlines() if line.endswith(suffix))
        done = fastadv_command(*shlex.split(line)[1:])
        assert done.code == 0, (line, done.err)
        assert "differ by" in done.out

    return write


def test_the_loader(run: Path, written: Callable[[str], None]) -> None:
    written(".safetensors")
    expected, images = fastadv.load_model(str(run)), torch.rand(3, 1, 8, 8)
    space: dict[str, Any] = {"fastadv": fastadv}
    exec(compile(block("loader"), "models-from-elsewhere.md", "exec"), space)
    assert len([line for line in block("loader").splitlines() if line]) <= 15
    assert torch.equal(space["load"]("rwp.safetensors")(images), expected(images))


@pytest.mark.slow
def test_the_programs(run: Path, written: Callable[[str], None]) -> None:
    expected, images = fastadv.load_model(str(run)), torch.rand(3, 1, 8, 8)
    written(".pt2")
    found = [torch.export.load("rwp.pt2").module()(images)]
    if has_onnx:
        written(".onnx")
        space: dict[str, Any] = {"images": images}
        exec(compile(block("onnx"), "models-from-elsewhere.md", "exec"), space)
        found.append(torch.from_numpy(space["logits"]))
    for logits in found:
        torch.testing.assert_close(logits, expected(images), rtol=1e-4, atol=1e-5)
