"""Crop, flip and their inverse in Triton's interpreter against the reference, bit for bit."""

from collections.abc import Sequence
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import LAYOUTS, call, gradients, images, laid_out, one_by_one, poisoned
from oracle import triton_and_reference as both
from torch import Tensor
from triton.runtime import interpreter

from fastadv.kernels import triton_common, triton_crop

INTERPRETER = interpreter._interpreter
ROWS = torch.tensor([3, 0, 5])
TOP, LEFT = torch.tensor([-2, 5, 0]), torch.tensor([7, -40, 1])
VIEW = (ROWS, TOP, LEFT, torch.tensor([True, False, True]))
STORES = {
    "uint8": torch.randint(0, 256, (6, 3, 13, 11), dtype=torch.uint8),
    "float32": torch.rand(6, 3, 13, 11),
    "float16": torch.rand(6, 3, 13, 11).to(torch.float16),
    "channels_last": torch.rand(6, 3, 13, 11).to(memory_format=torch.channels_last),
    "sliced": torch.rand(6, 5, 20, 30)[:, 1:4, 2:15, 3:25:2],
}


@pytest.mark.parametrize(
    ("store", "padding", "dtype", "size", "channels_last"),
    one_by_one(
        list(STORES),
        ["constant", "reflect"],
        [None, torch.float16],
        [(9, 8), (1, 1), (33, 31)],
        [False, True],
    ),
)
def test_crop_flip(
    store: str,
    padding: str,
    dtype: torch.dtype | None,
    size: tuple[int, int],
    channels_last: bool,
) -> None:
    options = {"fill": 0.3, "padding": padding, "channels_last": channels_last}
    triton, plain = both("crop_flip", STORES[store], *VIEW, size, dtype, **options)
    assert triton.dtype == plain.dtype
    assert torch.equal(triton, plain)
    layout = torch.channels_last if channels_last else torch.contiguous_format
    assert triton.is_contiguous(memory_format=layout)
    assert plain.is_contiguous(memory_format=layout)


FAR = torch.tensor([-(2**40), 2**40 + 7, 2**33])
# A wrong place on one axis would not show where the other is outside as well.
FAR_PLACES = {"both": (FAR, FAR.flip(0) + 5), "top": (FAR, LEFT), "left": (TOP, FAR)}


def test_every_byte_is_divided_exactly() -> None:
    store = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16)
    zero = torch.zeros(1, dtype=torch.int64)
    found = call("crop_flip", store, zero, zero, zero, zero != 0, (16, 16), backend="triton")
    expected = store.float() / 255
    assert torch.equal(found, expected)
    # The interpreter rounds the product as well; a GPU does not: float64 holds this sum exactly.
    high, low = (torch.tensor(each.value).double() for each in (triton_crop.HIGH, triton_crop.LOW))
    assert torch.equal((store * high + store * low).float(), expected)


class Watched:
    """Triton's interpreter, in which a kernel that reads or writes outside of the memory of
    ``tensors`` fails."""

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        storages = [t.untyped_storage() for t in tensors]
        self.ranges = [(s.data_ptr(), s.data_ptr() + s.nbytes()) for s in storages]
        self.accesses = 0

    def check(self, pointers: Any, mask: Any) -> None:
        used = pointers[mask]
        inside = [(used >= begin) & (used < end) for begin, end in self.ranges]
        assert np.any(inside, axis=0).all(), "outside of all tensors"
        self.accesses += used.size

    def load(self, pointers: Any, mask: Any, *rest: Any) -> Any:
        self.check(pointers, mask)
        return INTERPRETER.load(pointers, mask, *rest)

    def store(self, pointers: Any, value: Any, mask: Any) -> Any:
        self.check(pointers, mask)
        return INTERPRETER.store(pointers, value, mask)

    def __getattr__(self, name: str) -> Any:
        return getattr(INTERPRETER, name)


@pytest.mark.parametrize(
    ("padding", "size", "layout"),
    one_by_one(["reflect", "constant"], [(9, 8), (33, 31)], ["contiguous", "channels_last"]),
)
def test_no_access_outside_of_the_tensors(
    padding: str, size: tuple[int, int], layout: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Loads from the store have no mask: a pointer is always that of a pixel."""
    accesses = []

    def launch(kernel: Any, grid: Any, *args: Any, **options: Any) -> None:
        watched = Watched([a for a in args if isinstance(a, Tensor)])
        with mock.patch.object(interpreter, "_interpreter", watched):
            triton_common.launch(kernel, grid, *args, **options)
        accesses.append(watched.accesses)

    monkeypatch.setattr(triton_crop, "launch", launch)
    x = laid_out(images((3, 3, *size), 0), layout)
    for places in ((TOP, LEFT), FAR_PLACES["both"]):
        store = torch.rand(6, 3, 13, 11)
        view = (torch.tensor([5, 0, 3]), *places, VIEW[3])
        options = {"padding": padding, "channels_last": layout == "channels_last"}
        call("crop_flip", store, *view, size, backend="triton", **options)
        call("crop_flip_add", store, *view, x, 0.3, 0.1, backend="triton")
        call("crop_flip_write", store, *view, x, torch.tensor(True), backend="triton")
        call("crop_flip_ascend", store, *view, x, 0.3, backend="triton")
    assert min(accesses) >= x.numel()


def test_places_beyond_32_bits() -> None:
    """The memory is reserved, and only the pages of the store's pixels are used."""
    memory = torch.empty(2**32, dtype=torch.uint8)
    for strides in ((200, 2**31, 15, 1), (200, 20, 2**31 // 10, 1), (7, 2**31, 15 * 2**10, 2**10)):
        store = memory.as_strided((6, 2, 11, 13), strides)
        store.copy_(torch.randint(0, 256, store.shape, dtype=torch.uint8))
        for last in (False, True):
            triton, plain = both("crop_flip", store, *VIEW, (9, 8), channels_last=last)
            assert torch.equal(triton, plain)


def test_images_without_pixels() -> None:
    store, x = torch.rand(6, 3, 0, 4), torch.rand(3, 3, 2, 2)
    for backend in ("triton", "reference"):
        for name, rest in (("crop_flip", ((2, 2),)), ("crop_flip_add", (x, 0.3, 0.1))):
            with pytest.raises(ValueError, match="0x4 pixels"):
                call(name, store, *VIEW, *rest, backend=backend)
        call("crop_flip_write", store, *VIEW, x, backend=backend)
        call("crop_flip_ascend", store, *VIEW, x, 0.3, backend=backend)


@pytest.mark.parametrize("axis", FAR_PLACES)
@pytest.mark.parametrize("padding", ["constant", "reflect"])
def test_windows_far_outside_of_the_image(padding: str, axis: str) -> None:
    view = (ROWS, *FAR_PLACES[axis], VIEW[3])
    for size in ((9, 8), (33, 31)):
        triton, plain = both("crop_flip", STORES["float32"], *view, size, fill=0.3, padding=padding)
        assert torch.equal(triton, plain)


def test_reflection_where_there_is_one_pixel() -> None:
    store = torch.rand(6, 2, 1, 1)
    triton, plain = both("crop_flip", store, *VIEW, (3, 4), padding="reflect")
    assert torch.equal(triton, plain)


FLOATING = [name for name in STORES if name != "uint8"]


@pytest.mark.parametrize(
    ("store", "scale", "layout"), one_by_one(FLOATING, [0.3, torch.tensor(-2.0)], LAYOUTS)
)
def test_crop_flip_add(store: str, scale: float | Tensor, layout: str) -> None:
    x = laid_out(images((3, 3, 9, 8), 0), layout)
    triton, plain = both("crop_flip_add", STORES[store], *VIEW, x, scale, 0.1)
    assert torch.equal(triton[0], plain[0])
    assert torch.equal(triton[1], plain[1])
    if layout != "strided":
        assert [t.stride() for t in (*triton, *plain)] == [x.stride()] * 4
    for eps in (torch.tensor(0.1), torch.tensor([0.3, 0.0, 0.1]), torch.tensor([0.2]).expand(3)):
        triton, plain = both("crop_flip_add", STORES[store], *VIEW, x, scale, eps)
        assert torch.equal(triton[0], plain[0])
    with pytest.raises(ValueError, match="for 3 images"):
        call("crop_flip_add", STORES[store], *VIEW, x, scale, torch.ones(2), backend="triton")


@pytest.mark.parametrize(
    ("store", "ok", "layout"),
    one_by_one(FLOATING, [None, torch.tensor(True), torch.tensor(False)], LAYOUTS),
)
def test_write_and_ascend(store: str, ok: Tensor | None, layout: str) -> None:
    window = laid_out(gradients((3, 3, 9, 8), 0), layout)
    for name, rest in (("crop_flip_write", (ok,)), ("crop_flip_ascend", (0.3, -0.5, 0.5, ok))):
        triton, plain = STORES[store].clone(), STORES[store].clone()
        version = triton._version
        with poisoned():
            call(name, triton, *VIEW, window, *rest, backend="triton")
        call(name, plain, *VIEW, window, *rest, backend="reference")
        assert torch.equal(triton, plain)
        assert triton._version > version
        changed = (triton != STORES[store]).any()
        assert changed.item() == (ok is None or bool(ok))


def test_a_uint8_store_cannot_be_written() -> None:
    with pytest.raises(ValueError, match="floating"):
        call("crop_flip_write", STORES["uint8"], *VIEW, torch.rand(3, 3, 9, 8), backend="triton")


@settings(max_examples=30, deadline=None)
@given(st.data())
def test_what_is_written_is_read_back(data: st.DataObject) -> None:
    h, w = data.draw(st.integers(1, 6)), data.draw(st.integers(1, 6))
    height, width = data.draw(st.integers(h, 9)), data.draw(st.integers(w, 9))
    top = torch.tensor([data.draw(st.integers(0, height - h)) for _ in range(2)])
    left = torch.tensor([data.draw(st.integers(0, width - w)) for _ in range(2)])
    flip = torch.tensor([data.draw(st.booleans()) for _ in range(2)])
    view = (torch.tensor([2, 0]), top, left, flip)
    store, window = torch.zeros(3, 2, height, width), torch.rand(2, 2, h, w) + 1
    call("crop_flip_write", store, *view, window, backend="triton")
    assert torch.equal(call("crop_flip", store, *view, (h, w), backend="triton"), window)
    assert torch.count_nonzero(store) == window.numel()
    assert not store[1].any()
