"""What is wrong with a command line is one sentence in our words; help and version of commands."""

from __future__ import annotations

import re
import warnings
from pathlib import Path

import pytest

import fastadv
from fastadv.cli.main import CALLED, COMMANDS
from fastadv.errors import warn
from fastadv.exit_codes import ExitCode


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("trian", "Unknown command 'trian'; did you mean 'train'?"),
        ("xyzzy", "Unknown command 'xyzzy'; there are train, evaluate"),
        ("compare", "`fastadv compare` needs RUN_A, a run folder"),
        ("compare a", "`fastadv compare` needs RUN_B, another run folder"),
        ("pseudo-label x", "`fastadv pseudo-label` needs --images"),
        ("train extra", "`fastadv train` takes no 'extra' there"),
        ("train --lr", "--lr needs a value after it."),
        ("train --amp=yes", "--amp takes no value"),
        ("train --epochs 1e999", "--epochs takes a whole number, not '1e999'."),
        ("train --steps 3", "--steps belongs to --adversary pgd"),
        ("train --gamma 1", "belongs to --weights awp|rwp; this method is apart, with --weights"),
        ("train --bn-passes x", "Unknown --bn-passes 'x'"),
        ("train --image-sizes 8@0,x@1", "each value of --image-sizes (value@epoch) must be a who"),
        ("train --cycle-momentum --schedule cosine", "--cycle-momentum follows the peak"),
        ("train --points 0@0,abc", "--points takes value@epoch, such as 0@0,0.1@5,0@30, not"),
        ("train --batch-size atuo", "--batch-size must be a whole number or auto, not 'atuo'"),
        ("train --data ./imgs", "./imgs is not there; write folder:PATH"),
        ("train --resume aut --width 2", "no run folder 'aut'; did you mean --resume auto?"),
        ("bench --schema --only x --peers", "the schema alone: omit --only, --peers."),
        ("methods pgd --markdown", "--markdown prints a page of all methods: omit NAME."),
        ("methods pgd --bibtex --data cifar10", "--bibtex prints entries alone: omit --data."),
        ("methods --data cifar10", "all are listed: omit --data."),
        ("bench --only qqq", "Unknown row 'qqq'; among the"),
        (
            "evaluate x --norm l2",
            "A run folder says itself what it holds; omit --norm, or the folder.",
        ),
        ("train --depth 5", "--depth is for --model wide_resnet"),
        ("train --method=", "--method is empty"),
        ("train --out=", "--out is empty"),
        ("train --test-attacks clean,clean", "The attack 'clean' is named twice"),
        ("train --test-attacks clean,,pgd", "A name in the list of attacks is empty"),
        ("evaluate x --which bets", "did you mean 'best'?"),
        ("evaluate x --search-dtype bf61", "did you mean 'bf16'?"),
        ("compare x y --mode compild", "did you mean 'compiled'?"),
        ("evaluate x --on tset", "did you mean 'test'?"),
        ("train --method free --variant fastt --help", "did you mean 'fastat'?"),
        ("train --method aprat -h", "did you mean 'apart'?"),
    ],
)
def test_a_mistake_is_told_in_one_sentence(line, said, fastadv_command):
    outcome = fastadv_command(*line.split())
    assert outcome.code == 2
    assert said in outcome.err
    assert len(outcome.err.splitlines()) == 1
    assert len(outcome.err) < 600
    assert not outcome.out


def test_a_path_alone_names_its_kind(tmp_path, fastadv_command):
    (tmp_path / "imgs").mkdir()
    (tmp_path / "x.npz").write_bytes(b"")
    for given, kind in (("./imgs", "folder:./imgs"), ("imgs", "folder:imgs"), ("x.npz", "npz:x")):
        outcome = fastadv_command("train", "--data", given)
        assert outcome.code == 2
        assert f"write {kind}" in outcome.err


def test_a_file_is_no_run_folder(tmp_path, fastadv_command):
    (tmp_path / "my.toml").write_bytes(b"")
    outcome = fastadv_command("train", "--out", "my.toml", "--method", "standard", "--width", 2)
    assert (outcome.code, "my.toml is a file; --out names a folder." in outcome.err) == (2, True)


def test_own_norms_on_a_cpu_are_told(fastadv_command):
    words = ("--fused-norm", "on", "--device", "cpu", "--method", "standard", "--width", 2)
    outcome = fastadv_command("train", *words, "--epochs", 1, "--limit", 64, "--test-limit", 20)
    assert "--fused-norm on is for CUDA" in outcome.err


def test_the_form_of_a_method_has_its_own_title(fastadv_command):
    outcome = fastadv_command("methods", "free", "--variant", "fastat")
    assert "free: Free-4: 4 updates per batch" in outcome.out
    assert "Free-8:" not in outcome.out


@pytest.mark.parametrize("word", ["-h", "--help"])
@pytest.mark.parametrize("command", ["", *COMMANDS])
def test_every_command_has_help_of_one_layout(command, word, fastadv_command, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    outcome = fastadv_command(*command.split(), word)
    assert outcome.code == 0
    lines = outcome.out.splitlines()
    assert lines[0].startswith(f"Usage: fastadv {command}".rstrip())
    assert max(map(len, lines)) <= 80
    assert not set("╭│╰") & set(outcome.out)
    if not command:
        assert 24 <= len(lines) <= 50
        codes = [str(code.value) for code in ExitCode]
        for name in (*COMMANDS, "--version", "--install-completion", *codes):
            assert re.search(rf"^  {name} ", outcome.out, re.MULTILINE), name


def test_the_help_of_a_command_has_each_option_with_its_default(fastadv_command, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    said = fastadv_command("evaluate", "-h").out
    for line in (
        r"^Usage: fastadv evaluate \[RUN\.\.\.\] \[OPTIONS\]$",
        r"^  --eps NUMBER +radius, if not the run's$",
        r"^  --seed INT +seed of the attacks \[0\]$",
        r"^  --format TEXT +table, .* csv \[table\]$",
        r"^  --save-examples +write",
    ):
        assert re.search(line, said, re.MULTILINE), line


def test_the_documented_exit_codes_are_those_of_the_help():
    page = (Path(__file__).parents[1] / "docs" / "command-line.md").read_text()
    rows = re.findall(r"(?m)^\| (\d+) \| (.*) \|$", page)
    assert {int(code): text for code, text in rows} == {code: code.meaning for code in ExitCode}


def test_a_second_command_in_one_process_warns_again(fastadv_command, monkeypatch):
    def warns() -> None:
        """Warns."""
        warn("The same again.")

    shown = warnings.showwarning
    monkeypatch.setitem(CALLED, "attacks", warns)
    for _ in range(2):
        assert fastadv_command("attacks").err == "warning: The same again.\n"
    assert warnings.showwarning is shown


def test_the_version(fastadv_command):
    outcome = fastadv_command("--version")
    assert (outcome.code, outcome.out) == (0, f"fastadv {fastadv.__version__}\n")


def test_without_a_command_the_overview_is_printed(fastadv_command):
    bare, asked = fastadv_command(), fastadv_command("-h")
    assert (bare.code, bare.err) == (0, "")
    assert bare.out == asked.out
