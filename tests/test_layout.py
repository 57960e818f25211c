"""Lines are broken between words at the width of the terminal, on the real output of commands."""

from __future__ import annotations

import io
import re

import pytest
from rich.text import Text

from fastadv.printing.layout import UNLIMITED, columns, filled
from fastadv.printing.terminal import Terminal

EPOCH = (
    "epoch   1/30  loss 1.4075  lr 0.0190  val clean  91.0 %  val pgd-10   1.4 % of 144  "
    "train 0.8 s  eval 0.2 s"
)


def test_fields_stay_whole_where_they_fit():
    assert filled(EPOCH, 90, hang="  ").splitlines() == [
        "epoch   1/30  loss 1.4075  lr 0.0190  val clean  91.0 %  val pgd-10   1.4 % of 144",
        "  train 0.8 s  eval 0.2 s",
    ]
    for width in (40, 60, 80):
        lines = filled(EPOCH, width, hang="  ").splitlines()
        assert max(map(len, lines)) <= width
        assert " ".join(" ".join(lines).split()) == " ".join(EPOCH.split())
        assert not any(line.strip().startswith(("%", "s ")) for line in lines)


@pytest.mark.parametrize("width", [20, 33, 80])
def test_words_stay_whole_and_in_order(width):
    text = "a sentence with a-hyphenated-word and /a/path/that/is/longer/than/any/line/of/it here"
    lines = filled(text, width, hang="  ").splitlines()
    assert " ".join(" ".join(lines).split()) == text
    for line in lines:
        assert len(line) <= width or len(line.split()) == 1
    assert all(line.startswith("  ") for line in lines[1:])


def test_a_text_without_a_place_to_break_is_one_line():
    assert filled("x" * 100, 80) == "x" * 100
    assert filled("", 80) == ""
    assert filled("one\n\ntwo", 80) == "one\n\ntwo"


def test_columns_are_the_terminals_or_none(monkeypatch):
    monkeypatch.delenv("COLUMNS", raising=False)
    monkeypatch.setattr("os.get_terminal_size", _no_terminal)
    assert columns() == UNLIMITED
    monkeypatch.setenv("COLUMNS", "77")
    assert columns() == 77


def _no_terminal(*_):
    raise OSError


def printed(text, **options) -> str:
    file = io.StringIO()
    Terminal(file=file, **options).print(text)
    return file.getvalue()


def test_a_terminal_breaks_text_and_keeps_its_colours(monkeypatch):
    monkeypatch.delenv("COLUMNS", raising=False)
    long = "[red]error:[/] " + "word " * 40
    assert len(printed(long).splitlines()) == 1
    wide = printed(long, width=80, force_terminal=True, color_system="standard")
    lines = re.sub(r"\x1b\[[0-9;]*m", "", wide).splitlines()
    assert len(lines) > 2
    assert max(map(len, lines)) <= 80
    assert "\x1b[31merror:\x1b[0m" in wide
    assert all(line.startswith("  word") for line in lines[1:])
    assert printed(Text("[bold]x[/]")) == "[bold]x[/]\n"


@pytest.fixture
def run(fastadv_command, monkeypatch):
    """A short run in a folder with a long name, trained at 80 columns."""
    monkeypatch.setenv("COLUMNS", "80")
    name = "a-name-that-takes-some-room"
    words = ("--method", "fast", "--width", 2, "--epochs", 2, "--limit", 128, "--test-limit", 40)
    trained = fastadv_command("train", *words, "--name", name)
    assert trained.code == 0
    return f"runs/{name}", trained


@pytest.mark.slow
def test_no_line_of_a_command_is_wider_than_the_terminal(run, fastadv_command):
    folder, trained = run
    lines = [("train", trained)]
    for words in (
        ("evaluate", folder, "--attacks", "clean,pgd-1,pgd-2", "--which", "both"),
        ("evaluate", folder, "--attacks", "clean,pgd-1", "--limit", 20, "--save-examples"),
        ("evaluate", folder, "--sanity", "--limit", 10),
        ("export", folder, "--out", "weights.safetensors"),
        ("doctor",),
        ("methods",),
        ("methods", "free", "--variant", "fastat"),
        ("attacks",),
        ("train", "--test-attacks", "clean,,pgd"),
    ):
        lines.append((" ".join(map(str, words)), fastadv_command(*words)))
    for command, outcome in lines:
        assert outcome.code in (0, 2, 3), command
        assert outcome.out + outcome.err
        for line in (outcome.out + outcome.err).splitlines():
            assert len(line) <= 80, (command, line)
    examples = next(outcome for command, outcome in lines if "--save-examples" in command)
    assert re.search(rf"adversarial examples: *\n? *{folder}/verdicts/\S+\.npy", examples.out)
    doctor = next(outcome for command, outcome in lines if command == "doctor")
    assert doctor.out.count("Triton needs a CUDA device") <= 1


def test_where_there_is_no_terminal_a_sentence_is_a_line(run, fastadv_command, monkeypatch):
    monkeypatch.delenv("COLUMNS", raising=False)
    folder, _ = run
    said = fastadv_command("evaluate", folder, "--attacks", "clean", "--limit", 20).out
    assert f"kept in {folder}/evaluations.jsonl" in said
