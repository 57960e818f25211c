"""Small tensors joined before a reduction or a copy hold the same values."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fastadv.engine.optimizer.faults import all_finite
from fastadv.engine.optimizer.gradient_norm import total_norm
from fastadv.engine.optimizer.optimizer_copy import Copies
from fastadv.engine.packing import SMALL, FlatViews, packed


def tensors() -> list[Tensor]:
    """Small and large ones, another data type, other layouts, a single number."""
    torch.manual_seed(0)
    small = [torch.randn(3, 4), torch.randn(()), torch.randn(6, 4).t()]
    image = torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last)
    return [*small, image, torch.randn(SMALL + 1), torch.randn(5).double()]


def test_packed_tensors_hold_every_value_once() -> None:
    found = packed(tensors())
    values = torch.cat([each.flatten().double() for each in tensors()])
    joined = torch.cat([each.flatten().double() for each in found])
    assert torch.equal(joined.sort().values, values.sort().values)
    assert len(found) == 3  # the small ones, the large one, the other type


def test_the_norm_is_that_of_all_values() -> None:
    gradients = [each.double() for each in tensors()]
    expected = torch.cat([each.flatten() for each in gradients]).norm()
    torch.testing.assert_close(total_norm(gradients), expected, rtol=1e-12, atol=0)
    assert total_norm([]) == 0


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_value_that_is_not_finite_is_found_in_any_tensor(value: float) -> None:
    assert all_finite(tensors())
    for place in range(len(tensors())):
        given = tensors()
        given[place][(-1,) * given[place].dim()] = value
        assert not all_finite(given)


def test_views_follow_tensors_that_are_given_other_memory() -> None:
    known, given = FlatViews(), tensors()
    assert known.follow(given)
    assert not known.follow(given)
    given[0].data = torch.full((3, 4), 7.0)
    assert known.follow(given)
    assert torch.equal(known.views[0], torch.full((12,), 7.0))
    assert sum(each.numel() for each in known.packed()) == sum(each.numel() for each in given)


def test_copies_put_every_value_back() -> None:
    copies, given = Copies(), tensors()
    for _ in range(2):  # the second time the memory of the first is used again
        copies.take(given)
        for each in given:
            each.fill_(3)
        copies.put_back()
        for each, expected in zip(given, tensors(), strict=True):
            assert torch.equal(each, expected)
