"""What users may do with the step, the command line and the types, and what they must be told."""

from __future__ import annotations

from contextlib import chdir
from pathlib import Path
from typing import Any

import pytest
import torch
from mypy import api

import fastadv

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize("name", ["model", "optimizer", "plan"])
def test_what_a_step_was_built_of_cannot_be_replaced(name: str) -> None:
    """It would keep on using what it was built of."""
    model = fastadv.build_model("preact_resnet18", width=2)
    step = fastadv.step(model, torch.optim.SGD(model.parameters(), lr=0.1), "fgsm")
    with pytest.raises(AttributeError):
        setattr(step, name, getattr(step, name))


def test_a_command_after_two_dashes_is_not_ignored(fastadv_command: Any) -> None:
    """``--`` ends the options of ``fastadv`` itself; eps=300 is an error of ``train``."""
    done = fastadv_command("--", "train", "--eps", "300")
    assert done.code == 2
    assert "eps" in done.err
    assert fastadv_command("--", "train", "no-such-argument").code == 2
    for command in ("bench", "train"):
        plain, dashed = fastadv_command(command, "--help"), fastadv_command("--", command, "--help")
        assert plain.out == dashed.out


def test_mypy_finds_a_misspelt_public_name(tmp_path: Path) -> None:
    file = tmp_path / "program.py"
    file.write_text("import fastadv\n\nfastadv.evalaute\nfastadv.stpe(1, 2)\n")
    with chdir(ROOT):
        output, _, status = api.run(["--no-pretty", str(file)])
    assert status == 1, output
    assert output.count("[attr-defined]") == 2, output


def test_methods_refuses_an_unknown_data_set(fastadv_command: Any) -> None:
    done = fastadv_command("methods", "apart", "--data", "cifra10")
    assert done.code == 2
    assert "did you mean 'cifar10'?" in done.err


@pytest.mark.parametrize(
    ("method", "flag"), [("fgsm-n-igr", "--reg-weight"), ("te", "--te-weight")]
)
def test_help_of_a_method_shows_the_default_that_a_run_takes(method: str, flag: str) -> None:
    """Without --data the run is on digits, whose preset replaces the recipe's value."""
    from fastadv.cli.flags import groups
    from fastadv.run.request import RunRequest
    from fastadv.run.resolve import resolve_run

    rows = [row for _, found in groups(method) for row in found]
    (row,) = [row for row in rows if row.flag.split()[0] == flag]
    used = resolve_run(RunRequest(method=method)).options[flag[2:].replace("-", "_")]
    assert row.default in (f"{used:g}", "preset")


def test_a_run_refused_before_its_first_update_leaves_its_folder_free(tmp_path: Path) -> None:
    """A corrected command may take the folder; files of the user in it stay."""
    from fastadv.run.request import RunRequest
    from fastadv.run.train import train

    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "notes.txt").write_text("mine")
    empty = tmp_path / "empty"
    empty.mkdir()
    for out in (mine, empty, tmp_path / "new"):
        request = RunRequest(
            method="pgd-kdsa", out=str(out), epochs=1, width=2, limit=64, options={"steps": 1}
        )
        for _ in range(2):
            with pytest.raises(fastadv.UserError, match="teachers"):
                train(request)
    assert {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*")} == {
        "mine", "mine/notes.txt", "empty",
    }  # fmt: skip


def test_a_path_that_does_not_exist_is_named(tmp_path: Path) -> None:
    with pytest.raises(fastadv.UserError, match=r"There is no .*nowhere"):
        fastadv.load_model(str(tmp_path / "nowhere"))
