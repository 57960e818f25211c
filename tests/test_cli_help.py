"""Output of the command line before a run: help, the list of methods, misspelt options."""

from __future__ import annotations

import importlib
import pickle
import re
import subprocess
import sys
from dataclasses import fields
from typing import get_args

import pytest

import fastadv
from fastadv.algorithms.contract import option_names
from fastadv.algorithms.parts import PARTS, names
from fastadv.algorithms.recipes.table import METHODS
from fastadv.algorithms.slots import OPTIONAL, SLOTS
from fastadv.cli import settings, train_help
from fastadv.cli.flags import groups, train_parameters
from fastadv.cli.listing import listing, reported
from fastadv.cli.misspelt import MEANT
from fastadv.declared import meanings
from fastadv.evaluation.attacks.names import OPTIONS, Objective
from fastadv.evaluation.search.catalogue import CASCADES
from fastadv.run.request import setting_types

CLASSES = [
    pytest.param(part, id=f"{slot}-{name}") for slot in PARTS for name, part in PARTS[slot].items()
]


@pytest.fixture(autouse=True)
def eighty_columns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")


@pytest.mark.parametrize("part", CLASSES)
def test_every_option_of_a_part_says_what_it_means(part):
    said = meanings(part)
    for name in option_names(part):
        assert 0 < len(said[name]) <= 90, name
        assert said[name] == said[name].strip(), name
        assert not said[name].endswith("."), name
        assert said[name][0].islower() or said[name].split()[0].isupper(), name


def test_an_option_with_a_meaning_keeps_its_default_on_the_class_and_its_place():
    pgd = PARTS["adversary"]["pgd"]
    assert pgd.steps == 10
    assert PARTS["objective"]["trades"](3.0).beta == 3.0
    assert [entry.name for entry in fields(pgd) if entry.init] == list(option_names(pgd))


def test_every_setting_of_a_run_has_a_meaning_in_one_group():
    said = [pair for group in settings.SETTINGS.values() for pair in group.items()]
    assert sorted(name for name, _ in said) == sorted(setting_types())
    for name, text in said:
        assert 0 < len(text) <= 120, name
        assert not text.endswith("."), name
    assert {name for name, _ in said} >= settings.COMMON


def test_the_slots_are_those_of_the_parts():
    assert tuple(PARTS) == SLOTS
    assert set(OPTIONAL) < set(SLOTS)


def test_the_common_help_is_one_screen_and_as_the_options_are(fastadv_command):
    outcome = fastadv_command("train", "--help")
    assert outcome.code == 0
    lines = outcome.out.splitlines()
    assert 24 <= len(lines) <= 50
    assert max(map(len, lines)) <= 80
    assert sum("  fastadv train" in line for line in lines) in range(3, 7)
    assert outcome.out == train_help.common(), "run: python -m fastadv.cli.train_help"


def test_the_complete_help_has_every_option(fastadv_command):
    outcome = fastadv_command("train", "--help-all")
    assert outcome.code == 0
    assert max(map(len, outcome.out.splitlines())) <= 80
    for parameter in train_parameters():
        flag = parameter.name.replace("_", "-")
        assert f"--{flag} " in outcome.out or f"--[no-]{flag} " in outcome.out, flag
    assert "--resume FOLDER" in outcome.out
    assert "--trust-code" in outcome.out


def test_every_option_has_a_type_a_meaning_its_choices_and_its_default():
    rows = {row.flag.split()[0]: row for _, rows in groups() for row in rows}
    assert all(row.meaning for row in rows.values())
    assert rows["--norm"] == ("--norm NAME", "norm of the threat model", "linf, l2", "linf")
    assert rows["--steps"].flag == "--steps INT"
    assert rows["--beta"].default == "6"
    assert rows["--lr"].default == "preset"
    assert rows["--[no-]learned-start"].default == "on"
    assert rows["--attack-loss"].allowed == ", ".join(names("attack_loss"))
    assert "stored" in rows["--start"].allowed
    assert "awp" in rows["--weights"].allowed


@pytest.mark.parametrize("words", [("--method", "rwp", "--help"), ("--help", "--method=rwp")])
def test_help_with_a_method_shows_the_options_of_its_parts(words, fastadv_command):
    outcome = fastadv_command("train", *words)
    assert outcome.code == 0
    assert "--c-min NUMBER" in outcome.out
    assert "--beta" not in outcome.out.partition("Method and threat model")[2]


def test_help_with_an_unknown_method_is_one_sentence(fastadv_command):
    outcome = fastadv_command("train", "--method", "aprat", "--help")
    assert outcome.code == 2
    assert "did you mean 'apart'" in outcome.err


def test_the_methods_take_one_line_each_at_80_columns(fastadv_command):
    lines = fastadv_command("methods").out.splitlines()
    assert max(map(len, lines)) <= 80
    assert not any(line.endswith("...") for line in lines)
    assert len(lines) < 2 * len(METHODS) + 40
    for name, row in METHODS.items():
        (line,) = [line for line in lines if line.startswith(f" {name} ")]
        assert line.endswith(row.summary)
        assert reported(row) in line
        assert bool(reported(row)) == bool(row.reported)
    (pgd,) = [line for line in lines if line.startswith(" pgd ")]
    assert "52.79 PGD-20" in pgd
    assert lines[lines.index(pgd) - 1] == "Madry et al. 2018"


@pytest.mark.parametrize("width", [60, 80, 120])
def test_no_line_of_the_listing_is_wider_than_asked(width):
    assert max(map(len, listing(width).splitlines())) <= width


def test_a_piped_listing_is_plain_and_whole():
    command = [sys.executable, "-m", "fastadv", "methods"]
    environment = {"PATH": "", "TERM": "xterm-256color"}
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    assert done.stdout == listing(10_000) + "\n"
    assert "\x1b" not in done.stdout


def test_one_method_reads_at_80_columns(fastadv_command):
    outcome = fastadv_command("methods", "rwp")
    assert outcome.code == 0
    assert max(map(len, outcome.out.splitlines())) <= 80
    assert "c_min = 1.7  [part]\n    perturb along samples" in outcome.out


def test_the_attacks_are_listed_at_80_columns(fastadv_command):
    outcome = fastadv_command("attacks")
    assert outcome.code == 0
    lines = outcome.out.splitlines()
    assert max(map(len, lines)) <= 80
    listed = [line.split()[0] for line in lines if line[:1].strip()]
    for name in (*OPTIONS, *CASCADES):
        assert name == "cascade" or listed.count(name) == 1, name
    (square,) = [line for line in lines if line.startswith("square ")]
    assert square.split()[1:3] == ["QUERIES-RESTARTS", "5000-1"]
    for objective in get_args(Objective):
        assert objective in " ".join(lines)


@pytest.mark.parametrize("command", ["evaluate", "compare"])
def test_the_help_says_where_the_attacks_are_listed(command, fastadv_command):
    words = re.sub(r"[│\s]+", " ", fastadv_command(command, "--help").out)
    assert "all: fastadv attacks" in words


def test_commands_that_only_print_do_not_import_torch():
    code = (
        "import sys\n"
        "from fastadv.cli.main import main\n"
        "for words in ('--help', 'train --help', 'evaluate --help', 'methods'):\n"
        "    sys.argv = ['fastadv', *words.split()]\n"
        "    try: main()\n"
        "    except SystemExit as done: assert not done.code, words\n"
        "    assert 'torch' not in sys.modules, words\n"
        "import fastadv; fastadv.step; assert 'torch' in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


def test_the_public_names_are_imported_on_first_use():
    assert [name for name in dir(fastadv) if name != "__version__"] == sorted(fastadv.__all__)
    for name in fastadv.__all__:
        home = importlib.import_module(f"fastadv.{fastadv._HOMES[name]}")
        assert getattr(fastadv, name) is getattr(home, name)
    threat = fastadv.Threat("linf", 8 / 255)
    assert pickle.loads(pickle.dumps(threat)) == threat
    with pytest.raises(AttributeError, match="nonsense"):
        fastadv.nonsense  # noqa: B018


@pytest.mark.parametrize(
    ("given", "meant"),
    [("--epsilon", "--eps"), ("--learning-rate", "--lr"), ("--methd", "--method")],
)
def test_an_unknown_option_names_the_one_that_was_meant(given, meant, fastadv_command):
    outcome = fastadv_command("train", given, 1)
    assert outcome.code == 2
    assert f"did you mean '{meant}'?" in outcome.err
    assert len(outcome.err.strip().splitlines()) == 1


def test_an_unknown_option_without_a_near_name_points_to_help(fastadv_command):
    outcome = fastadv_command("train", "--zzzz", 1)
    assert outcome.code == 2
    assert "train --help" in outcome.err


@pytest.mark.parametrize(
    ("given", "written"),
    [
        ("--steps", "--attacks pgd-50-10"),
        ("--restarts", "--attacks pgd-50-10"),
        ("--batch-size", "omit it"),
    ],
)
@pytest.mark.parametrize("command", ["evaluate", "compare"])
def test_what_an_attack_has_in_its_name_is_no_option(command, given, written, fastadv_command):
    outcome = fastadv_command(command, "runs/one", "runs/two", given, 20)
    assert outcome.code == 2
    assert written in outcome.err
    assert "did you mean" not in outcome.err


def test_compare_says_how_its_runs_get_a_time_limit(fastadv_command):
    outcome = fastadv_command("compare", "runs/one", "runs/two", "--time-limit", 60)
    assert outcome.code == 2
    assert "evaluate both runs with it first" in outcome.err


@pytest.mark.parametrize("option", ["--limit", "--seed", "--width"])
def test_a_word_in_place_of_a_number_is_shown(option, fastadv_command):
    outcome = fastadv_command("evaluate", "runs/one", option, "ten")
    assert outcome.code == 2
    assert outcome.err == f"error: {option} takes a whole number, not 'ten'.\n"


def test_suggestions_exist_and_existing_options_are_not_replaced():
    flags = {"--" + entry.name.replace("_", "-") for entry in train_parameters()}
    assert set(MEANT.values()) <= flags
    assert not set(MEANT) & flags
