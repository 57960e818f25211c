"""The tab key completes commands, options and names, without torch; help and version are quick."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import shellingham

from fastadv.cli import completion, stored_completion


def asked(line: str, shell: str) -> dict[str, str]:
    """The environment in which a shell asks for what the last word of ``line`` may become."""
    return {
        "_FASTADV_COMPLETE": f"complete_{shell}",
        "COMP_WORDS": line,
        "COMP_CWORD": str(len(line.split(" ")) - 1),
        "_TYPER_COMPLETE_ARGS": line,
        "_TYPER_COMPLETE_FISH_ACTION": "get-args",
    }


@pytest.fixture
def completed(monkeypatch, fastadv_command):
    def offered(line: str, shell: str = "bash") -> list[str]:
        for name, value in asked(line, shell).items():
            monkeypatch.setenv(name, value)
        outcome = fastadv_command()
        assert outcome.code == 0, outcome.err
        return outcome.out.split()

    return offered


def test_a_completion_does_not_import_torch():
    code = (
        "import sys; sys.argv = ['fastadv']\n"
        "from fastadv.cli.main import main\n"
        "try: main()\n"
        "except SystemExit as done: assert not done.code\n"
        "assert 'torch' not in sys.modules\n"
    )
    environment = os.environ | asked("fastadv train --metho", "bash")
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True)
    assert (done.returncode, done.stdout) == (0, b"--method\n"), done.stderr


@pytest.mark.parametrize(
    ("line", "offered"),
    [
        ("fastadv tr", ["train"]),
        ("fastadv train --batch", ["--batch-size"]),
        ("fastadv train --dry", ["--dry-run"]),
        ("fastadv train --method rwp", ["rwp"]),
        ("fastadv train --weights aw", ["awp"]),
        ("fastadv train --schedule one", ["one-cycle"]),
        ("fastadv train --data cifar", ["cifar10", "cifar100"]),
        ("fastadv evaluate runs/x --attacks clean,malt,auto", None),
        ("fastadv evaluate --which be", ["best"]),
        ("fastadv methods nfg", []),
        ("fastadv bench --methods n-f", ["n-fgsm"]),
    ],
)
def test_what_is_offered(line, offered, completed):
    found = completed(line)
    if offered is None:
        offered = [f"clean,malt,{name}" for name in stored("attacks") if name.startswith("auto")]
        assert offered
    assert found == offered


def stored(kind: str) -> list[str]:
    return completion.of(kind)("")


@pytest.mark.parametrize("shell", ["zsh", "fish"])
def test_other_shells_are_served(shell, completed):
    assert "--method" in " ".join(completed("fastadv train --metho", shell))


def test_the_stored_names_are_those_there_are():
    stored_text = completion.STORED.read_text(encoding="utf-8")
    assert stored_text == stored_completion.content(), "run: python -m fastadv.cli.train_help"


def test_the_script_is_shown_or_the_shell_is_unknown(fastadv_command, monkeypatch):
    for shell, said in (("zsh", completion.VARIABLE), ("sh", "The shell sh has no completion")):
        monkeypatch.setattr(shellingham, "detect_shell", lambda *_, shell=shell: (shell, shell))
        outcome = fastadv_command("--show-completion")
        assert outcome.code == (2 if shell == "sh" else 0)
        assert said in outcome.out + outcome.err
