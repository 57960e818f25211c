"""Named streams of noise: no two draw the same numbers."""

from __future__ import annotations

import ast
import zlib
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import torch

from fastadv import kernels
from fastadv.engine import noise
from fastadv.engine.noise import Stream, noise_stream
from fastadv.errors import UserError

PACKAGE = Path(__file__).parents[1] / "fastadv"


@pytest.fixture(autouse=True)
def _own_names(monkeypatch: pytest.MonkeyPatch) -> None:
    """Streams of a test are forgotten after it."""
    monkeypatch.setattr(noise, "_names", dict(noise._names))


def made_in(module: str, name: str) -> Stream:
    """``stream(name)`` as the file of ``module`` would call it."""
    space: dict[str, Any] = {"__name__": module, "noise_stream": noise_stream}
    exec(f"found = noise_stream({name!r})", space)
    return space["found"]


def shift_of(name: str) -> int:
    """The offset of a stream's draws: 15 bits of its name's checksum, above 41 bits of updates."""
    return (zlib.crc32(name.encode()) & 0x7FFF) << 41


def draws(found: Stream, update: int = 0) -> torch.Tensor:
    index = torch.arange(8)
    offset = torch.tensor(update + found.shift)
    return kernels.noise_uniform(index, (3, 6, 6), 0, offset, found.number, torch.float64)


def test_the_name_decides_the_stream() -> None:
    found = made_in("mine", "elle.near")
    assert found == Stream(noise.NAMED, shift_of("elle.near"))
    # The counter of a draw has 56 bits; updates and a second attack (NEIGHBOR) take the lower 41.
    assert found.shift < 1 << 56
    assert found.shift % (noise.NEIGHBOR << 1) == 0


def test_a_module_that_is_run_again_has_the_same_stream() -> None:
    assert made_in("mine", "elle.near") == made_in("mine", "elle.near")


def test_the_same_name_in_another_module_is_refused() -> None:
    made_in("mine", "elle.near")
    with pytest.raises(UserError) as told:
        made_in("yours", "elle.near")
    text = str(told.value)
    assert "'elle.near' of yours" in text
    assert "of mine" in text
    assert text.endswith("give it another name.")
    assert made_in("mine", "elle.near")  # the first owner keeps it


def test_another_name_with_the_same_number_is_refused() -> None:
    first = "elle.near"
    second = next(f"other.{n}" for n in count() if shift_of(f"other.{n}") == shift_of(first))
    made_in("mine", first)
    for module in ("mine", "yours"):
        with pytest.raises(UserError, match="give it another name"):
            made_in(module, second)


def test_draws_of_two_streams_and_two_updates_differ() -> None:
    streams = [made_in("mine", name) for name in ("elle.near", "elle.far")]
    streams += [Stream(noise.START), Stream(noise.AUGMENTATION), Stream(noise.NAMED)]
    streams += [Stream(noise.NAMED, noise.NEIGHBOR)]
    drawn = [draws(found, update) for found in streams for update in (0, 1)]
    rows = torch.stack([each.flatten() for each in drawn])
    assert rows.abs().max() < 1
    correlations = torch.corrcoef(rows) - torch.eye(len(rows))
    assert correlations.abs().max() < 5 / rows.shape[1] ** 0.5
    assert torch.equal(draws(streams[0]), drawn[0])


def test_every_part_that_draws_names_its_own_stream() -> None:
    """``noise_stream`` is called at the top of a module, once per name."""
    names = []
    for file in PACKAGE.rglob("*.py"):
        for node in ast.parse(file.read_text()).body:
            call = getattr(node, "value", None)
            if isinstance(call, ast.Call) and ast.unparse(call.func) == "noise_stream":
                names.append(ast.literal_eval(call.args[0]))
    assert {"gradalign.near", "logitalign.noise", "bernoulli.signs"} <= set(names)
    assert len(names) == len(set(names))
    assert len({shift_of(name) for name in names}) == len(names)
