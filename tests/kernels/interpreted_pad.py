"""Padded channels in Triton's interpreter against the reference."""

import pytest
import torch
from oracle import LAYOUTS, SHAPES, images, laid_out
from oracle import triton_and_reference as both

from fastadv.kernels import reference_pad, triton_pad


@pytest.mark.parametrize("shape", [*SHAPES, (0, 3, 4, 4), (2, 11, 5, 4)])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_padded_channels_are_the_reference_bit_for_bit(
    shape: tuple[int, ...], layout: str, dtype: torch.dtype
) -> None:
    x = laid_out(images(shape, 0), layout)
    for channels in {shape[1], 16, 24}:
        triton, plain = both("pad_channels_forward", x, channels, dtype)
        assert torch.equal(triton, plain)
        assert triton.dtype == dtype
        assert triton.is_contiguous(memory_format=torch.channels_last)


def test_the_gradient_and_its_gradient_are_the_references() -> None:
    x, weight = images((2, 3, 5, 4), 0).requires_grad_(), images((2, 8, 5, 4), 1)
    found = []
    for pad in (triton_pad.pad_channels, reference_pad.pad_channels):
        # The cube makes the second derivative depend on x.
        padded = pad(x, 8, torch.float32)
        (slope,) = torch.autograd.grad((padded**3 * weight).sum(), x, create_graph=True)
        (second,) = torch.autograd.grad(slope.square().sum(), x)
        found.append((slope.detach(), second))
    assert torch.equal(found[0][0], found[1][0])
    assert torch.equal(found[0][1], found[1][1])


def test_fewer_channels_are_refused() -> None:
    for pad in (triton_pad.pad_channels, reference_pad.pad_channels):
        with pytest.raises(ValueError, match="cannot be padded to 2 channels"):
            pad(images((2, 3, 5, 4), 0), 2, torch.float16)
