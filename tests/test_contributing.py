"""The examples in CONTRIBUTING.md are code that works."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from fastadv.algorithms.parts import PARTS
from fastadv.evaluation.attacks.names import OPTIONS
from fastadv.evaluation.search.catalogue import SEARCHES

ROOT = Path(__file__).parents[1]


def block(name: str) -> str:
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    found = re.search(rf"<!-- {name} -->\n```python\n(.*?)```", text, flags=re.S)
    assert found, f"CONTRIBUTING.md has no block {name!r}"
    return found[1]


def test_the_example_part_and_its_test(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "logit_squeeze.py").write_text(block("part"))
    monkeypatch.syspath_prepend(tmp_path)
    from logit_squeeze import LogitSqueeze

    monkeypatch.setitem(PARTS["regularizer"], "logit-squeeze", LogitSqueeze)
    exec(compile(block("test"), "CONTRIBUTING.md", "exec"), {})
    # The example's test can fail: without the regularizer the weights are others.
    monkeypatch.setattr(LogitSqueeze, "term", lambda *_: torch.zeros((), dtype=torch.float64))
    with pytest.raises(AssertionError):
        exec(compile(block("test"), "CONTRIBUTING.md", "exec"), {})


def test_the_example_attack_and_its_test(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "momentum.py").write_text(block("attack"))
    monkeypatch.syspath_prepend(tmp_path)
    from momentum import Momentum

    monkeypatch.setitem(SEARCHES, "mi-fgsm", Momentum)
    monkeypatch.setitem(OPTIONS, "mi-fgsm", OPTIONS["apgd-ce"])
    exec(compile(block("attack-test"), "CONTRIBUTING.md", "exec"), {})
    # The example's test can fail: without a gradient the later steps go elsewhere.
    monkeypatch.setattr(Momentum, "wants_gradient", lambda search, state: state["iteration"] < 2)
    with pytest.raises(AssertionError):
        exec(compile(block("attack-test"), "CONTRIBUTING.md", "exec"), {})
