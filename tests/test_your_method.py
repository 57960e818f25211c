"""docs/your-method.md: its code is run, and the names in its tables exist."""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from plugin_files import EXAMPLE, ROOT, forgotten_after
from tiny import tiny_batch
from torch import nn

import fastadv
from fastadv.algorithms import contract
from fastadv.algorithms.registry import BASES
from fastadv.errors import UserError

PAGE = (ROOT / "docs" / "your-method.md").read_text(encoding="utf-8")
SMALL = ("--width", 2, "--epochs", 1, "--limit", 128, "--test-limit", 40, "--steps", 1)


def block(name: str) -> str:
    found = re.search(rf"<!-- {name} -->\n```\w*\n(.*?)```", PAGE, flags=re.S)
    assert found, f"the page has no block {name!r}"
    return found[1]


@pytest.fixture(autouse=True)
def pairing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The page's file in a folder of its own, from where it can be imported."""
    file = tmp_path / "pairing.py"
    file.write_text(block("pairing"))
    monkeypatch.syspath_prepend(tmp_path)
    with forgotten_after("pairing"):
        yield file


def test_the_file_is_the_example() -> None:
    assert block("pairing") == EXAMPLE.read_text()


def test_the_commands_run(fastadv_command: Callable[..., Any]) -> None:
    for line in block("commands").splitlines():
        words = shlex.split(line)[1:]
        begins = words[0] == "train" and "--resume" not in words
        done = fastadv_command(*words, *(SMALL if begins else ()))
        assert done.code == 0, (line, done.err)


def test_the_step_and_the_test_run(monkeypatch: pytest.MonkeyPatch) -> None:
    exec(compile(block("step"), "your-method.md", "exec"), {})
    exec(compile(block("test"), "your-method.md", "exec"), {})
    # The page's test can fail: with the cross entropy alone the weights are others.
    from pairing import Pairing

    plain = lambda self, outputs, y, fit: fit(outputs.adversarial, y, outputs.context)  # noqa: E731
    monkeypatch.setattr(Pairing, "per_sample", plain)
    with pytest.raises(AssertionError):
        exec(compile(block("test"), "your-method.md", "exec"), {})


def test_the_slots_of_the_page() -> None:
    rows = re.findall(r"^\| `(\w+)` \| (`.*?`) \|", PAGE, flags=re.M)
    assert [slot for slot, _ in rows] == list(BASES)
    for slot, classes in rows:
        named = [getattr(fastadv, name) for name in re.findall(r"`(\w+)`", classes)]
        assert named[0] is BASES[slot]
        assert all(issubclass(each, BASES[slot]) for each in named)


def test_the_hooks_of_the_page_exist() -> None:
    named = set(re.findall(r"`([A-Z]\w+)\.(\w+)`", PAGE))
    assert len(named) > 15
    for owner, hook in named:
        kind = getattr(contract, owner, None) or getattr(fastadv, owner)
        assert hook in dir(kind) or hook in kind.__annotations__, f"{owner}.{hook}"
    assert "NEEDS" in contract.__all__


@pytest.mark.parametrize("path", re.findall(r"`((?:fastadv|tests)/[\w/.]+)`", PAGE))
def test_the_files_of_the_page_exist(path: str) -> None:
    assert (ROOT / path).exists()


class Segments(nn.Module):
    """Logits of every pixel (B,4,H,W)."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 1).double()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.conv(x)


def test_what_the_page_says_is_refused() -> None:
    x, y, index, _ = tiny_batch()
    model = Segments()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(UserError, match="norm"):
        fastadv.step(model, optimizer, "pgd", norm="l1")
    step = fastadv.step(model, optimizer, "pgd", mode="eager")
    with pytest.raises(UserError, match="y must be"):
        step(x, y.view(-1, 1, 1).expand(-1, 6, 6).contiguous(), index)
    with pytest.raises(UserError, match="must return logits"):
        step(x, y, index)
    with pytest.raises(UserError, match="steps"):
        fastadv.step(model, optimizer, "pgd", steps=torch.full((8,), 3))
