"""A checkpoint is written only if its reader accepts it: what is saved is read back equal."""

from __future__ import annotations

import enum
from collections import OrderedDict, defaultdict, namedtuple
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given
from hypothesis import settings as limits
from hypothesis import strategies as some
from torch import Tensor

from fastadv.errors import UserError
from fastadv.storage import checkpoint
from fastadv.storage.checkpoint_file import DTYPES


class Level(enum.IntEnum):
    HIGH = 3


Pair = namedtuple("Pair", "first second")

ROWS = torch.arange(24.0).reshape(2, 3, 2, 2)
LAYOUTS = {
    "dense": ROWS,
    "channels last": ROWS.contiguous(memory_format=torch.channels_last),
    "transposed": ROWS[0, 0].t(),
    "every second": torch.arange(10.0)[::2],
    "part": torch.arange(1000.0)[3:5],
    "expanded": torch.ones(1).expand(5),
    "overlapping": torch.arange(6.0).unfold(0, 3, 1),
    "no dimensions": torch.tensor(-0.0),
    "empty": torch.empty(0, 3),
    "empty part": torch.arange(4.0)[2:2],
    "lazily negative": torch._neg_view(torch.arange(3.0)),
    "parameter": torch.nn.Parameter(torch.ones(2)),
    "with gradients": torch.ones(2, requires_grad=True) * 2,
}


def same(first: Any, second: Any) -> bool:
    """Equal in types, order and every bit."""
    if type(first) is not type(second):
        return False
    if isinstance(first, dict):
        return same(list(first.items()), list(second.items()))
    if isinstance(first, (list, tuple)):
        return len(first) == len(second) and all(map(same, first, second))
    if isinstance(first, Tensor):
        alike = first.dtype == second.dtype and first.shape == second.shape
        whole = [value.contiguous().reshape(-1).view(torch.uint8) for value in (first, second)]
        return alike and torch.equal(*whole)
    return repr(first) == repr(second)


def read_back(path: Path, value: Any) -> Any:
    checkpoint.save(path, {"value": value})
    return checkpoint.load(path)["value"]


@some.composite
def tensors(draw: some.DrawFn) -> Tensor:
    kind = draw(some.sampled_from(sorted(DTYPES, key=str)))
    layout = draw(some.sampled_from(sorted(LAYOUTS)))
    found = LAYOUTS[layout].detach().resolve_neg().to(kind)
    return found.transpose(0, -1) if found.ndim and draw(some.booleans()) else found


VALUES = some.recursive(
    some.none() | some.booleans() | some.integers() | some.floats() | some.text() | tensors(),
    lambda inner: some.lists(inner, max_size=4) | some.tuples(inner, inner)
    | some.dictionaries(some.text(max_size=3) | some.integers(-9, 9), inner, max_size=4),
    max_leaves=10,
)  # fmt: skip


@given(VALUES)
@limits(
    max_examples=80,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
def test_what_is_saved_is_read_back_equal(tmp_path: Path, value: Any) -> None:
    assert same(read_back(tmp_path / "x.pt", value), value)


@pytest.mark.parametrize("kind", sorted(DTYPES, key=str))
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_of_every_type_is_read_back(
    layout: str, kind: torch.dtype, tmp_path: Path
) -> None:
    value = LAYOUTS[layout].detach().resolve_neg().to(kind)
    found = read_back(tmp_path / "x.pt", value)
    assert same(found, value)
    if layout == "channels last":
        assert found.stride() == value.stride()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_tensors_as_found_in_practice_are_read_back(layout: str, tmp_path: Path) -> None:
    found = read_back(tmp_path / "x.pt", LAYOUTS[layout])
    assert type(found) is Tensor
    assert torch.equal(found, LAYOUTS[layout].detach())


@pytest.mark.parametrize(
    ("value", "plain"),
    [
        (torch.__version__, str(torch.__version__)), (np.float64(1.5), 1.5), (Level.HIGH, 3),
        (Pair(1, 2), (1, 2)), (defaultdict(int, a=1), {"a": 1}), ({np.str_("a"): 1}, {"a": 1}),
    ],
)  # fmt: skip
def test_subclasses_are_saved_as_the_plain_type(value: Any, plain: Any, tmp_path: Path) -> None:
    assert same(read_back(tmp_path / "x.pt", [value])[0], plain)


@pytest.mark.parametrize(
    "value",
    [
        np.int64(3), np.ones(2), b"x", {1}, Path("x"), 1j, object(), torch.float32,
        torch.ones(2, dtype=torch.complex64), torch.ones(2, dtype=torch.uint16),
        torch.ones(2).to(torch.float8_e4m3fn), torch.eye(2).to_sparse(),
        torch.ones(2, device="meta"),
    ],
)  # fmt: skip
def test_values_that_the_reader_would_refuse_are_not_written(value: Any, tmp_path: Path) -> None:
    path = tmp_path / "x.pt"
    checkpoint.save(path, {"value": 1})
    with pytest.raises((TypeError, UserError), match="checkpoint cannot hold"):
        checkpoint.save(path, {"value": [value]})
    assert checkpoint.load(path) == {"value": 1}
    assert [file.name for file in tmp_path.iterdir()] == ["x.pt"]


def test_a_weight_that_many_modules_share_is_read_back(tmp_path: Path) -> None:
    """Its bytes count once in the file and once for each name in what is read."""
    shared = torch.nn.Linear(300, 300)
    state = torch.nn.Sequential(*[shared] * 9).state_dict()
    found = read_back(tmp_path / "x.pt", state)
    assert same(list(found.items()), list(state.items()))
    assert type(found) is OrderedDict


def test_a_small_part_of_a_large_tensor_is_a_small_file(tmp_path: Path) -> None:
    read_back(tmp_path / "x.pt", torch.zeros(1_000_000)[:10])
    assert (tmp_path / "x.pt").stat().st_size < 10_000
