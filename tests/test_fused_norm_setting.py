"""The setting fused_norm: its words, its choice by device, its place in a run and its record."""

from __future__ import annotations

import io
import json
from collections.abc import Mapping
from pathlib import Path

import pytest
import rich.console
import torch
from edited import edit
from tiny import sgd, tiny_model

import fastadv
from fastadv.benchmark.rows import Row, read_rows
from fastadv.cli.doctor import _own_norms
from fastadv.engine.model import fused_norm_choice
from fastadv.engine.model.fused_norm_choice import FASTER, choose
from fastadv.errors import UserError
from fastadv.run.console import Console
from fastadv.run.request import RunRequest
from fastadv.run.run_folder import RunFolder
from fastadv.run.train import resume, train
from fastadv.training.settings import Execution

RESULTS = Path(__file__).parents[1] / "bench" / "results"
CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)
SMALL = {
    "method": "fast", "width": 2, "epochs": 1, "limit": 64, "batch_size": 32, "test_limit": 32,
    "mode": "eager", "select_attack": "fgsm", "test_attacks": "clean",
}  # fmt: skip


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> None:
    """The device cuda:0 is one on which the own kernels were measured to be faster."""
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a GPU")
    monkeypatch.setattr(fused_norm_choice, "FASTER", {"a GPU": "a run"})


@pytest.mark.parametrize(
    ("setting", "device", "expected"),
    [
        ("on", CUDA, True),
        ("auto", CUDA, True),
        ("off", CUDA, False),
        ("on", CPU, False),
        ("auto", CPU, False),
        ("off", CPU, False),
    ],
)
@pytest.mark.usefixtures("measured")
def test_the_setting_decides_on_cuda_only(
    setting: str, device: torch.device, expected: bool
) -> None:
    assert choose(setting, device) is expected


@pytest.mark.usefixtures("measured")
def test_auto_is_off_on_a_device_without_a_measurement(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "another GPU")
    assert not choose("auto", CUDA)
    assert choose("on", CUDA)


def unproven(faster: Mapping[str, str], rows: list[Row]) -> list[str]:
    """The devices in ``faster`` whose named run does not show a gain in each of its rows."""
    found = []
    for device, run in faster.items():
        here = [
            row["times"]["p10"]
            for row in rows
            if (row.get("kind"), row.get("run"), row.get("device")) == ("fused norm", run, device)
            and not row.get("preliminary")
        ]
        if not here or min(here) <= 1:
            found.append(device)
    return found


def test_auto_is_on_only_where_measured_rows_show_a_gain() -> None:
    row = {"kind": "fused norm", "run": "a", "device": "a GPU", "times": {"p10": 1.01}}
    slower = row | {"times": {"p10": 0.99}}
    assert unproven({"a GPU": "a"}, [row]) == []
    for others in ([], [row, slower], [row | {"run": "b"}], [row | {"device": "b"}]):
        assert unproven({"a GPU": "a"}, others) == ["a GPU"]
    assert unproven({"a GPU": "a"}, [row | {"preliminary": True}]) == ["a GPU"]
    assert unproven(FASTER, read_rows(RESULTS)) == []


@pytest.mark.parametrize("word", ["onn", True, None])
def test_another_word_is_one_sentence(word: object) -> None:
    model = tiny_model()
    with pytest.raises(UserError, match=r"Unknown fused_norm .*(did you mean 'on'\?|known: auto)"):
        fastadv.step(model, sgd(model), "pgd", fused_norm=word)
    with pytest.raises(UserError, match="Unknown fused_norm"):
        choose(word, CPU)


def test_another_word_on_the_command_line_is_one_sentence(fastadv_command) -> None:
    outcome = fastadv_command("train", "--fused-norm", "onn")
    assert outcome.code == 2
    assert outcome.err == "error: Unknown --fused-norm 'onn'; did you mean 'on'?\n"


def test_the_network_of_a_step_has_the_choice(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def choosing(setting: str, device: torch.device) -> bool:
        asked.append((setting, device.type))
        return setting == "on"

    monkeypatch.setattr("fastadv.training.internals.choose", choosing)
    model = tiny_model()
    on, off = (fastadv.step(model, sgd(model), "pgd", fused_norm=word) for word in ("on", "off"))
    fastadv.step(model, sgd(model), "pgd")
    assert asked == [("on", "cpu"), ("off", "cpu"), ("auto", "cpu")]
    assert on.internals.net.fused_norm is True
    assert off.internals.net.fused_norm is False
    assert repr(on).endswith(", auto, fused_norm on>")
    assert repr(off).endswith(", auto>")
    assert Execution().fused_norm == "auto"


def _said_by(work, *given) -> str:
    out = io.StringIO()
    work(*given, Console(rich.console.Console(file=out, width=1000)))
    return out.getvalue()


@pytest.mark.parametrize("chosen", [True, False])
def test_a_run_says_and_records_what_auto_chose(
    chosen: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fastadv.training.internals.choose", lambda setting, device: chosen)
    out = tmp_path / "run"
    said = _said_by(train, RunRequest(**SMALL, out=str(out)))
    (device,) = [line for line in said.splitlines() if "training images" in line]
    assert device.endswith(", eager" + (", fused_norm on" if chosen else ""))
    assert RunFolder.open(str(out)).read_config().fused_norm == ("on" if chosen else "off")


def test_a_setting_of_the_users_is_recorded_as_it_was_given(tmp_path: Path) -> None:
    out = tmp_path / "run"
    said = _said_by(train, RunRequest(**SMALL, fused_norm="on", out=str(out)))
    assert "fused_norm on" not in said  # this is a CPU
    assert RunFolder.open(str(out)).read_config().fused_norm == "on"


def test_a_run_continues_with_the_other_setting_and_says_so(tmp_path: Path) -> None:
    out = tmp_path / "run"
    train(RunRequest(**SMALL, out=str(out)), Console())
    edit(out / "config.toml", "epochs = 1", "epochs = 2")
    edit(out / "config.toml", 'fused_norm = "off"', 'fused_norm = "on"')
    said = _said_by(resume, str(out))
    (sentence,) = [line for line in said.splitlines() if "not bit for bit" in line]
    assert "fused_norm off before, on now" in sentence
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [line["epoch"] for line in lines] == [1, 2]


@pytest.mark.usefixtures("measured")
def test_doctor_says_what_auto_does_here_and_why(fastadv_command, monkeypatch) -> None:
    assert _own_norms(CPU).startswith("off, own BatchNorm kernels are for CUDA")
    assert _own_norms(CUDA).startswith("on, measured to be faster")
    monkeypatch.setattr(fused_norm_choice, "FASTER", {})
    assert _own_norms(CUDA).startswith("off, no gain was measured on this device")
    assert len(f"  --fused-norm auto: {_own_norms(CUDA)}") <= 80
    assert "  --fused-norm auto: o" in fastadv_command("doctor").out
