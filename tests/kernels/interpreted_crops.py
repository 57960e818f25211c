"""Crop, flip and their inverse in Triton's interpreter against the reference, bit for bit."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import LAYOUTS, call, gradients, images, laid_out, poisoned
from oracle import triton_and_reference as both
from torch import Tensor

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


@pytest.mark.parametrize("store", STORES)
@pytest.mark.parametrize("padding", ["constant", "reflect"])
@pytest.mark.parametrize("dtype", [None, torch.float16])
@pytest.mark.parametrize("size", [(9, 8), (1, 1), (33, 31)])
@pytest.mark.parametrize("channels_last", [False, True])
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


@pytest.mark.parametrize("store", [name for name in STORES if name != "uint8"])
@pytest.mark.parametrize("scale", [0.3, torch.tensor(-2.0)])
@pytest.mark.parametrize("layout", LAYOUTS)
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


@pytest.mark.parametrize("store", [name for name in STORES if name != "uint8"])
@pytest.mark.parametrize("ok", [None, torch.tensor(True), torch.tensor(False)])
@pytest.mark.parametrize("layout", LAYOUTS)
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
