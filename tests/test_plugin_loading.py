"""Plugins on the command line, in Python and in installed packages; what a bad one is told."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from plugin_files import EXAMPLE, forgotten_after, load
from tiny import tiny_batch, tiny_model

import fastadv
from fastadv.algorithms.parts import PARTS
from fastadv.algorithms.recipe import Recipe
from fastadv.errors import UserError
from fastadv.run.presets import presets_for

SMALL = ("--width", 2, "--epochs", 1, "--limit", 128, "--test-limit", 40, "--steps", 1)

Command = Callable[..., Any]

HALF = """
from fastadv import Objective, Recipe, option, register, register_recipe
from fastadv.declared import Positive

@register("half")
class Half(Objective):
    size: Positive = option(0.5, "factor of the loss")

    def per_sample(self, outputs, y, fit):
        return self.size * fit(outputs.adversarial, y, outputs.context)

register_recipe("half", Recipe("half the loss", "a test", objective="half"))
"""


@pytest.fixture(autouse=True)
def _forgotten() -> Iterator[None]:
    with forgotten_after():
        yield


@pytest.fixture
def half(tmp_path: Path) -> Path:
    file = tmp_path / "half.py"
    file.write_text(HALF)
    return file


def test_a_plugin_trains_and_resumes_through_the_command_line(fastadv_command: Command) -> None:
    named = ("--plugin", EXAMPLE)
    done = fastadv_command(
        "train", *named, "--method", "pairing", *SMALL, "--pairing", 2, "--out", "run"
    )
    assert done.code == 0, done.err
    assert "pairing on digits" in done.out
    config = Path("run/config.toml").read_text()
    assert 'objective = "pairing"' in config
    assert "pairing = 2.0" in config
    settings, _, places = config.partition("[places]")
    assert str(EXAMPLE) not in settings  # a loaded file never names code that is run
    assert str(EXAMPLE) in places  # where it was, for the sentence that asks for it
    done = fastadv_command("evaluate", "run", *named, "--attacks", "clean", "--limit", 10)
    assert done.code == 0, done.err


def test_a_resumed_run_asks_for_its_plugin(fastadv_command: Command, half: Path) -> None:
    words = ("--method", "half", *SMALL, "--out", "run")
    with forgotten_after():
        done = fastadv_command("train", "--plugin", half, *words)
        assert done.code == 0, done.err
    refused = fastadv_command("train", "--resume", "run")
    assert refused.code == 2
    assert "add --plugin with the file" in refused.err
    assert refused.err.count("\n") == 1
    again = fastadv_command("train", f"--plugin={half}", "--resume", "run")
    assert again.code == 0, again.err


def test_a_stopped_run_says_how_it_continues(fastadv_command: Command, half: Path) -> None:
    stops = "    def schedule(self, update, epoch):\n        if update:\n"
    stops += "            signal.raise_signal(signal.SIGINT)\n"
    half.write_text(HALF.replace("    def per_sample", stops + "\n    def per_sample"))
    half.write_text("import signal\n" + half.read_text())
    words = ("train", "--plugin", half, "--method", "half", *SMALL, "--out", "run")
    done = fastadv_command(*words)
    assert done.code == 130
    assert f"continue with: fastadv train --plugin {half} --resume run" in done.err


def test_a_plugin_that_was_edited_since_is_reported(fastadv_command: Command, half: Path) -> None:
    words = ("--method", "half", *SMALL, "--out", "run")
    with forgotten_after():
        assert fastadv_command("train", "--plugin", half, *words).code == 0
    half.write_text(HALF + "\n# another version\n")
    done = fastadv_command("train", "--plugin", half, "--resume", "run")
    assert "half.py" in done.err


def test_methods_explains_a_plugins_method(fastadv_command: Command) -> None:
    done = fastadv_command("methods", "--plugin", EXAMPLE, "pairing")
    assert done.code == 0, done.err
    for words in ("Kannan et al. 2018", "held together", "pairing", "2 training"):
        assert words in done.out
    assert "pairing" in fastadv_command("methods", "--plugin", EXAMPLE).out


def test_help_lists_a_plugins_options(fastadv_command: Command, half: Path) -> None:
    done = fastadv_command("train", "--plugin", half, "--method", "half", "--help")
    assert done.code == 0
    assert "factor of the loss" in done.out


@pytest.mark.parametrize("command", ["evaluate", "methods", "export", "pseudo-label"])
def test_the_help_of_every_command_names_plugins(fastadv_command: Command, command: str) -> None:
    done = fastadv_command(command, "--help")
    assert done.code == 0
    assert "--plugin" in done.out


def test_a_misspelt_option_of_a_plugin(fastadv_command: Command, half: Path) -> None:
    done = fastadv_command("train", "--plugin", half, "--method", "half", "--siez", 1)
    assert done.code == 2
    assert "did you mean '--size'?" in done.err
    bad = fastadv_command("train", "--plugin", half, "--method", "half", "--size", -1)
    assert bad.code == 2
    assert "size must be above 0" in bad.err


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("def broken(:\n", "in line 1: SyntaxError"),
        ("\nimport no_such_package\n", "in line 2: ModuleNotFoundError"),
        ("from fastadv import register\n@register('x')\nclass X: pass\n", "is no part: derive it"),
        (HALF.replace('"half"', '"ce"', 1), "The objective 'ce' exists already"),
        (HALF.replace('recipe("half"', 'recipe("pgd"'), "The method 'pgd' exists already"),
        (HALF.replace('"half"', '"Half Loss"', 1), "small letters, digits and hyphens"),
        (HALF.replace('objective="half"', 'objective="hlaf"'), "did you mean 'half'?"),
        (HALF.replace("size:", "eps:"), "which is a setting of every run"),
        (
            "from fastadv import noise_stream\nnoise_stream('gradalign.near')\n",
            "give it another name",
        ),
    ],
)
def test_a_bad_plugin_is_refused_in_one_sentence(
    text: str, told: str, tmp_path: Path, fastadv_command: Command
) -> None:
    (tmp_path / "bad.py").write_text(text)
    done = fastadv_command("train", "--plugin", "bad.py", "--method", "half", *SMALL)
    assert done.code == 2
    assert told in done.err
    assert "Traceback" not in done.err


@pytest.mark.parametrize("words", [("--plugin",), ("--plugin=",), ("--plugin", "nowhere.py")])
def test_a_plugin_that_is_not_there(words: tuple[str, ...], fastadv_command: Command) -> None:
    done = fastadv_command("train", *words)
    assert done.code == 2
    assert "Python file with your parts" in done.err


class Entry(SimpleNamespace):
    """Stands in for an entry point of an installed package."""

    def load(self) -> Any:
        return self.action()


def installed(monkeypatch: pytest.MonkeyPatch, **plugins: Callable[[], Any]) -> None:
    def entry_points(*, group: str) -> list[Entry]:
        assert group == "fastadv.plugins"
        return [Entry(name=name, action=action) for name, action in plugins.items()]

    monkeypatch.setattr(importlib.metadata, "entry_points", entry_points)


def test_installed_plugins_are_found(
    monkeypatch: pytest.MonkeyPatch, fastadv_command: Command
) -> None:
    installed(monkeypatch, pairing=load)
    assert "pairing" in fastadv.methods()
    done = fastadv_command("methods", "pairing")
    assert done.code == 0, done.err
    assert "Kannan et al. 2018" in done.out


def test_an_installed_plugin_that_fails_is_left_out_with_a_warning(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def broken() -> None:
        raise ImportError("no module named 'absent'")

    installed(monkeypatch, broken=broken, pairing=load)
    with pytest.warns(UserWarning, match="The installed plugin 'broken' failed and is left out"):
        names = fastadv.methods()
    assert {"pgd", "pairing"} <= set(names)


def test_a_part_itself_in_place_of_its_name() -> None:
    example = load()
    x, y, index, _ = tiny_batch()
    models = [tiny_model(), tiny_model()]
    losses = []
    ways = ({"objective": example.Pairing(pairing=3.0)}, {"objective": "pairing", "pairing": 3.0})
    for model, options in zip(models, ways, strict=True):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        step = fastadv.step(model, optimizer, "pgd", eps=0.1, steps=2, mode="eager", **options)
        losses.append(step(x, y, index)["loss"])
    assert torch.equal(*losses)


def test_a_class_that_is_not_registered_serves_as_a_part() -> None:
    class Doubled(fastadv.Objective):
        def per_sample(self, outputs: Any, y: Any, fit: Any) -> Any:
            return 2 * fit(outputs.adversarial, y, outputs.context)

    x, y, index, _ = tiny_batch()
    losses = []
    for objective in (Doubled(), "ce"):
        model = tiny_model()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        step = fastadv.step(
            model, optimizer, "pgd", eps=0.1, steps=2, mode="eager", objective=objective
        )
        losses.append(step(x, y, index)["loss"])
    torch.testing.assert_close(losses[0], 2 * losses[1])


def test_registering_twice_is_allowed_for_the_same_part_only() -> None:
    load()
    part = PARTS["objective"]["pairing"]
    assert fastadv.register("pairing")(part) is part
    with pytest.raises(UserError, match="The objective 'pairing' exists already"):
        fastadv.register("pairing")(type("Other", (fastadv.Objective,), {}))
    with pytest.raises(UserError, match="The method 'pairing' exists already"):
        fastadv.register_recipe("pairing", Recipe("another", "a test"))


def test_a_part_is_found_wherever_its_tensors_are_kept_alive() -> None:
    """A recording keeps the tensors of parts from elsewhere, too."""
    from fastadv.training.recording import held_tensors

    part = load().Pairing()
    part.share = torch.zeros(())
    assert any(tensor is part.share for tensor in held_tensors([part], set()))


def test_an_option_cannot_have_the_name_of_an_argument_of_step(half: Path) -> None:
    half.write_text(HALF.replace("size:", "seed:").replace("self.size", "self.seed"))
    from fastadv.algorithms import plugins

    plugins.load_file(half)
    model = tiny_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(UserError, match="'seed', which is an argument of"):
        fastadv.step(model, optimizer, "half")


def test_a_part_that_was_refused_can_be_passed_again() -> None:
    """Only a step that was built keeps it."""
    part = PARTS["objective"]["trades"]()
    model = tiny_model()
    with pytest.raises(UserError, match="optimizer must be"):
        fastadv.step(model, None, "pgd", objective=part)  # type: ignore[arg-type]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(UserError, match="cannot be combined"):
        fastadv.step(model, optimizer, "pgd", objective=part, adversary="none")
    fastadv.step(model, optimizer, "pgd", objective=part)
    with pytest.raises(UserError, match="of another step"):
        fastadv.step(model, optimizer, "pgd", objective=part)


def test_a_part_that_is_passed_shares_its_options_by_name() -> None:
    """NuAT's norm stands in the regularizer and in the attack's loss, with one weight."""
    norm, attack = PARTS["regularizer"]["nuclear"], PARTS["attack_loss"]["nuclear"]
    model = tiny_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    step = fastadv.step(model, optimizer, "nuat", regularizer=norm(reg_weight=9.0))
    parts = (step.plan.regularizer, step.plan.attack_loss)
    assert [part.reg_weight for part in parts] == [9.0, 9.0]
    both = {"regularizer": norm(reg_weight=9.0), "attack_loss": attack()}
    with pytest.raises(UserError, match=r"reg_weight is 4\.5 in one .* and 9\.0 in another"):
        fastadv.step(model, optimizer, "nuat", **both)


def test_a_recipe_with_an_option_that_no_part_has_is_refused() -> None:
    with pytest.raises(UserError, match=r"Unknown option of the recipe 'mine': 'stpes'; did you"):
        fastadv.register_recipe("mine", Recipe("a", "test", options={"stpes": 3}))
    wrong = {"cifar10": fastadv.OnData(options={"alhpa": 0.1})}
    with pytest.raises(UserError, match="'alhpa'; did you mean 'alpha'"):
        fastadv.register_recipe("mine", Recipe("a", "test", on_data=wrong))


def test_a_misspelt_setting_of_a_recipe_is_told() -> None:
    fastadv.register_recipe("mine", Recipe("a", "test", training={"epochz": 3}))
    with pytest.raises(UserError, match=r"setting of the recipe 'mine': 'epochz'; did you mean"):
        presets_for("mine", "digits", {}, {})


def test_a_registered_part_has_a_default_for_each_option() -> None:
    class Bare(fastadv.Objective):
        size: float

    with pytest.raises(UserError, match="option 'size' of Bare has no default"):
        fastadv.register("bare")(Bare)


@pytest.mark.parametrize("name", ["resume", "trust_code", "help", "plugin"])
def test_an_option_cannot_have_the_name_of_a_flag(
    name: str, fastadv_command: Command, tmp_path: Path
) -> None:
    file = tmp_path / "flag.py"
    file.write_text(HALF.replace("size", name))
    done = fastadv_command("train", "--plugin", file, "--method", "half", *SMALL)
    assert done.code != 0
    assert f"has an option '{name}'" in done.err


def test_a_plugin_that_exits_is_told(fastadv_command: Command, tmp_path: Path) -> None:
    file = tmp_path / "leaves.py"
    file.write_text("import sys\n\nsys.exit(0)\n")
    done = fastadv_command("methods", "--plugin", file)
    assert done.code != 0
    assert "leaves.py failed in line 3: SystemExit: 0" in done.err
