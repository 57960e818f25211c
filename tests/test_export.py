"""``fastadv export``: every form gives the network's logits, and nothing wrong is written."""

from __future__ import annotations

import dataclasses
import importlib.util
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from fastadv.errors import UserError
from fastadv.run import export
from fastadv.run.console import Console
from fastadv.run.export import export_run
from fastadv.run.loaded import load_run
from fastadv.run.request import RunRequest
from fastadv.run.saved_models import load_model
from fastadv.run.train import train

SMALL: dict[str, Any] = {
    "method": "fast",
    "width": 2,
    "shortcut": "raw",
    "epochs": 1,
    "limit": 96,
    "batch_size": 32,
    "mode": "eager",
    "select_attack": "fgsm",
    "test_attacks": "clean",
    "test_limit": 16,
}

with_onnx = pytest.mark.skipif(
    importlib.util.find_spec("onnxruntime") is None, reason="onnxruntime is not installed"
)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "run"
    train(RunRequest(**SMALL, out=str(out)), Console())
    return out


LINES: dict[str, str] = {}


@pytest.fixture(scope="module")
def exported(run: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Gives the file of a name, which is exported once; its line is in ``LINES``."""
    folder = tmp_path_factory.mktemp("exported")

    def file(name: str) -> Path:
        if name not in LINES:
            LINES[name] = export_run(str(run), folder / name)
        return folder / name

    return file


def read_safetensors(file: Path) -> Callable[[Tensor], Tensor]:
    return load_model(str(file))


def read_torch(file: Path) -> Callable[[Tensor], Tensor]:
    program: nn.Module = torch.export.load(file).module()
    return program


def read_onnx(file: Path) -> Callable[[Tensor], Tensor]:
    from onnx import load
    from onnx.checker import check_model
    from onnx.reference import ReferenceEvaluator

    program = load(file)
    check_model(program, full_check=True)
    assert {node.domain for node in program.graph.node} == {""}
    evaluator = ReferenceEvaluator(program)  # not the runtime that the export was checked with
    return lambda x: torch.from_numpy(evaluator.run(None, {"images": x.numpy()})[0])


FORMS: dict[str, Any] = {
    "model.safetensors": read_safetensors,
    "model.pt2": read_torch,
    "model.onnx": read_onnx,
}


@pytest.mark.parametrize(
    "name", ["model.safetensors", "model.pt2", pytest.param("model.onnx", marks=with_onnx)]
)
def test_every_form_gives_the_logits_of_the_network(name: str, run: Path, exported: Any) -> None:
    again = FORMS[name](exported(name))
    found = re.search(r"its logits on 8 test images differ by (\S+) of the largest", LINES[name])
    assert found
    assert float(found[1]) < 1e-5
    _, data, model = load_run(str(run), "best").evaluated
    model.eval()
    x = torch.cat([images for images, _ in data.test.limited(5)])
    with torch.no_grad():
        for batch in (x, x[:1], torch.cat([x, x])):
            torch.testing.assert_close(again(batch), model(batch), rtol=1e-5, atol=1e-5)


@with_onnx
def test_a_program_says_what_it_was_made_of(exported: Any) -> None:
    import onnx

    notes = {entry.key: entry.value for entry in onnx.load(exported("model.onnx")).metadata_props}
    assert notes["model"] == "preact_resnet18"
    assert (notes["width"], notes["shortcut"], notes["method"]) == ("2", "raw", "fast")
    extra = {"fastadv.json": ""}
    torch.export.load(exported("model.pt2"), extra_files=extra)
    assert '"shortcut": "raw"' in extra["fastadv.json"]


def test_a_program_needs_no_fastadv(exported: Any) -> None:
    graph = torch.export.load(exported("model.pt2")).graph
    called = {str(node.target) for node in graph.nodes if node.op == "call_function"}
    assert called
    assert all(name.startswith("aten.") for name in called), called


def test_the_weights_alone_rebuild_the_network(run: Path, exported: Any) -> None:
    """The notes say the form of the shortcut, which no tensor shows."""
    file = str(exported("model.safetensors"))
    x, expected = torch.rand(3, 1, 8, 8), load_model(str(run))
    torch.testing.assert_close(load_model(file)(x), expected(x), rtol=0, atol=0)
    assert not torch.allclose(load_model(file, shortcut="preact")(x), expected(x))
    assert torch.equal(load_file(file)["normalize.mean"], expected.normalize.mean)


def disturbed(by: float) -> Callable[[Any], tuple[bytes, Callable[[Tensor], Tensor]]]:
    """A writer whose file gives other logits than the network."""

    def write(made: Any) -> tuple[bytes, Callable[[Tensor], Tensor]]:
        return b"content", lambda x: made.model(x) + by * made.model(x).abs().max()

    return write


@pytest.mark.parametrize(("by", "passes"), [(0.9e-4, True), (1.2e-4, False), (float("nan"), False)])
def test_other_logits_are_not_written(
    by: float, passes: bool, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    entry = export.FORMS["torch"]._replace(write=disturbed(by))
    monkeypatch.setitem(export.FORMS, "torch", entry)
    if passes:
        assert "differ by 9.0e-05" in export_run(str(run), tmp_path / "model.pt2")
        assert (tmp_path / "model.pt2").read_bytes() == b"content"
        return
    with pytest.raises(UserError, match="would give other logits than the network"):
        export_run(str(run), tmp_path / "model.pt2")
    assert not list(tmp_path.iterdir())


class Undecided(nn.Module):
    """Which pass it makes depends on the values of the images, so no program holds it."""

    def forward(self, x: Tensor) -> Tensor:
        flat = x.flatten(1)[:, :10]
        return flat if float(x.sum()) > 3 else 2 * flat


def test_a_network_that_is_no_program_is_refused(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = dataclasses.replace(load_run(str(run)), model=Undecided())
    monkeypatch.setattr(export, "load_run", lambda path, which: found)
    with pytest.raises(UserError, match="cannot be written as torch") as refused:
        export_run(str(run), tmp_path / "model.pt2")
    assert "\n" not in str(refused.value)
    assert not list(tmp_path.iterdir())


def test_mistakes(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "there.onnx").write_bytes(b"mine")
    (tmp_path / "link.pt2").symlink_to("nowhere")
    calls: list[tuple[str, str | None, str]] = [
        ("there.onnx", None, "exists: choose another --out"),
        ("link.pt2", None, "exists: choose another --out"),
        ("model.bin", None, r"end it with .safetensors, .pt2, .onnx, or add --format"),
        ("model.onnx", "torch", "says by its name that it is onnx, and --format says torch"),
        ("model.pt2", "tensorflow", "Unknown format 'tensorflow'"),
        ("no/model.pt2", None, "There is no folder"),
    ]
    for name, form, sentence in calls:
        with pytest.raises(UserError, match=sentence):
            export_run(str(run), tmp_path / name, form=form)
    assert (tmp_path / "there.onnx").read_bytes() == b"mine"
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=re.escape("pip install 'fastadv[onnx]'")):
        export_run(str(run), tmp_path / "model.onnx")


def test_the_command_names_the_file_itself(run: Path, tmp_path: Path, fastadv_command: Any) -> None:
    done = fastadv_command("export", run)
    assert done.code == 0, done.err
    said = "wrote model.safetensors (safetensors); read back, its logits on 8 test images differ"
    assert done.out.startswith(said)
    assert (tmp_path / "model.safetensors").exists()
    done = fastadv_command("export", run, "--format", "safetensors")
    assert done.code == 2
    assert "model.safetensors exists" in done.err
    assert len(done.err.strip().splitlines()) == 1
