"""A mistyped option is told before torch is imported."""

from __future__ import annotations

import os
import subprocess
import sys

from fastadv.cli import known_options
from fastadv.cli.main import COMMANDS

MISTAKES = """
import sys
from fastadv.cli.main import main
for words in {lines}:
    sys.argv = ["fastadv", *words]
    try:
        main()
    except SystemExit as ended:
        assert ended.code == 2, words
    assert "torch" not in sys.modules, words
"""


def test_no_command_imports_torch_for_a_mistyped_option():
    needs = {"compare": ["a", "b"], "evaluate": ["a"], "export": ["a"], "pseudo-label": ["a"]}
    lines = [[name, *needs.get(name, []), "--metod", "x"] for name in COMMANDS]
    lines += [["train", "--lr"], ["train", "extra"], ["train", "--amp=yes"]]
    code = MISTAKES.format(lines=lines)
    wide = {**os.environ, "COLUMNS": "400"}
    ran = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=wide, check=False
    )
    assert ran.returncode == 0, ran.stderr
    told = ran.stderr.splitlines()
    assert len(told) == len(lines)
    assert told[0] == "error: Unknown option '--metod'; did you mean '--method'?"
    assert told[-3:] == [
        "error: --lr needs a value after it.",
        "error: `fastadv train` takes no 'extra' there; options begin with two dashes, and "
        "`fastadv train -h` lists them.",
        "error: --amp takes no value: write --amp alone, or omit it.",
    ]


def test_an_installed_plugin_may_have_options_of_its_own(monkeypatch):
    monkeypatch.setattr(known_options.plugins, "are_installed", lambda: True)
    known_options.require_known_options(["train", "--option-of-a-plugin", "1"])
