"""Crop and flip against padding, slicing and flipping; and the way back."""

import re

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fastadv import kernels
from fastadv.kernels import choice

ROWS = torch.tensor([3, 0, 5])
FLIP = torch.tensor([True, False, True])
FAR = 30


def windows_by_padding(
    store: Tensor, top: Tensor, left: Tensor, size: tuple[int, int], fill: float
) -> Tensor:
    """The windows, cut out of a store padded so far that none leaves it."""
    padded = F.pad(store, (FAR,) * 4, value=fill)
    found = []
    for row, t, s, flip in zip(ROWS, top + FAR, left + FAR, FLIP, strict=True):
        window = padded[row, :, t : t + size[0], s : s + size[1]]
        found.append(window.flip(-1) if flip else window)
    return torch.stack(found)


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_crop_flip_by_padding(data: st.DataObject) -> None:
    offsets = st.lists(st.integers(-20, 20), min_size=3, max_size=3)
    top, left = torch.tensor(data.draw(offsets)), torch.tensor(data.draw(offsets))
    size = (data.draw(st.integers(1, 10)), data.draw(st.integers(1, 10)))
    store = torch.rand(6, 3, 9, 8, dtype=torch.float64)
    expected = windows_by_padding(store, top, left, size, 0.5)
    assert torch.equal(kernels.crop_flip(store, ROWS, top, left, FLIP, size, fill=0.5), expected)


@pytest.mark.parametrize("dtype", [None, torch.float64, torch.float16])
def test_bytes_become_units(dtype: torch.dtype | None) -> None:
    store = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16)
    zero = torch.zeros(1, dtype=torch.int64)
    window = kernels.crop_flip(store, zero, zero - 1, zero, zero != 0, (17, 16), dtype, fill=0.25)
    exact = (torch.arange(256, dtype=torch.float64) / 255).view(1, 1, 16, 16)
    assert window.dtype == (dtype or torch.float32)
    torch.testing.assert_close(window[:, :, 1:].double(), exact.to(window.dtype).double())
    assert (window[:, :, 0] == 0.25).all()


def test_reflection_is_torchs() -> None:
    store = torch.rand(6, 3, 9, 8)
    top, left = torch.tensor([-4, 0, 3]), torch.tensor([2, -7, 5])
    padded = F.pad(store, (7, 7, 8, 8), mode="reflect")
    for b in range(3):
        t, s = int(top[b]) + 8, int(left[b]) + 7
        expected = padded[ROWS[b], :, t : t + 9, s : s + 8]
        expected = expected.flip(-1) if FLIP[b] else expected
        found = kernels.crop_flip(store, ROWS, top, left, FLIP, (9, 8), padding="reflect")[b]
        assert torch.equal(found, expected)
    with pytest.raises(ValueError, match="'edge'"):
        kernels.crop_flip(store, ROWS, top, left, FLIP, (9, 8), padding="edge")  # type: ignore[arg-type]


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_write_is_the_inverse_and_touches_nothing_else(data: st.DataObject) -> None:
    offsets = st.lists(st.integers(-9, 9), min_size=3, max_size=3)
    view = (ROWS, torch.tensor(data.draw(offsets)), torch.tensor(data.draw(offsets)), FLIP)
    store, window = torch.rand(6, 2, 7, 6), torch.rand(3, 2, 5, 4) + 2
    before = store.clone()
    kernels.crop_flip_write(store, *view, window, torch.tensor(False))
    assert torch.equal(store, before)
    kernels.crop_flip_write(store, *view, window, torch.tensor(True))
    read = kernels.crop_flip(store, *view, (5, 4), fill=-1)
    assert torch.equal(read[read >= 0], window[read >= 0])
    assert (store >= 2).sum() == (read >= 0).sum()
    assert torch.equal(store[store < 2], before[store < 2])


def test_apart_start_and_update() -> None:
    store = torch.randn(6, 3, 9, 8, dtype=torch.float64)
    view = (ROWS, torch.tensor([0, 1, 2]), torch.tensor([3, 0, 1]), FLIP)
    x, grad = torch.rand(3, 3, 6, 5, dtype=torch.float64), torch.randn(3, 3, 6, 5)
    start, window = kernels.crop_flip_add(store, *view, x, torch.tensor(0.2), 0.1)
    assert torch.equal(window, kernels.crop_flip(store, *view, (6, 5)))
    torch.testing.assert_close(start, (x + (0.2 * window).clamp(-0.1, 0.1)).clamp(0, 1))
    updated = store.clone()
    kernels.crop_flip_ascend(updated, *view, grad, torch.tensor(0.3).double())
    expected = (window + 0.3 * grad.sign()).clamp(-1, 1)
    assert torch.equal(kernels.crop_flip(updated, *view, (6, 5)), expected)
    kernels.crop_flip_write(updated, *view, window)
    assert torch.equal(updated, store)


def test_what_cannot_be_written_is_refused() -> None:
    view = (ROWS, ROWS, ROWS, FLIP)
    store = torch.zeros(6, 3, 9, 8, dtype=torch.uint8)
    with pytest.raises(ValueError, match="floating"):
        kernels.crop_flip_write(store, *view, torch.rand(3, 3, 4, 4))


FACES = [
    "reference",
    pytest.param(
        "triton", marks=pytest.mark.skipif(not choice.TRITON_INSTALLED, reason="needs Triton")
    ),
]


@pytest.mark.parametrize("face", FACES)
@pytest.mark.parametrize("shape", [(2, 3, 6, 5), (3, 1, 6, 5)], ids=["channels", "rows"])
def test_windows_that_do_not_fit_the_store_are_refused(face: str, shape: tuple[int, ...]) -> None:
    """Refused before the launch, which would read and write out of bounds."""
    store, rows = torch.zeros(5, 1, 6, 5), torch.tensor([3, 0])
    windows = torch.ones(shape)
    for name, rest in (
        ("crop_flip_add", (0.3, 0.1)),
        ("crop_flip_write", ()),
        ("crop_flip_ascend", (0.3,)),
    ):
        function = choice.triton_function(name) if face == "triton" else getattr(kernels, name)
        expected = rf"{re.escape(str(shape))} do not fit 2 rows .*{re.escape('(5, 1, 6, 5)')}"
        with pytest.raises(ValueError, match=expected):
            function(store, rows, rows, rows, FLIP[:2], windows, *rest)
    assert not store.any()
