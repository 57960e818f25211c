"""How the launchers pass arguments: tensors as flat memory, scalars as numbers or pointers."""

from collections.abc import Sequence

import torch
from torch import Tensor

from .rows import check_rows


def is_dense(t: Tensor) -> bool:
    """True if the elements fill one contiguous range of memory, in any order of the dimensions."""
    if t.is_contiguous():  # the usual case, and much faster to find out
        return True
    expected = 1
    for stride, size in sorted(zip(t.stride(), t.shape, strict=True)):
        if size != 1 and stride != expected:
            return False
        expected *= size
    return True


def dense(t: Tensor) -> Tensor:
    """``t`` itself, or a contiguous copy if its memory has gaps or overlaps."""
    return t if is_dense(t) else t.contiguous()


def are_alike(first: Tensor, second: Tensor) -> bool:
    """True if both lie in memory in the same order, the second being dense."""
    if first.stride() == second.stride():
        return True
    # The stride of a dimension of size 1 does not matter.
    return first.is_contiguous() and second.is_contiguous()


def laid_out_as(t: Tensor, model: Tensor) -> Tensor:
    """``t`` itself, or a copy of it with the memory layout of the dense tensor ``model``."""
    if are_alike(t, model):
        return t
    return torch.empty_like(model, dtype=t.dtype).copy_(t)


def float_or_pointer(value: float | Tensor, device: torch.device) -> tuple[float, Tensor | None]:
    """A kernel's two arguments for a scalar: (value, None), or (unused, 0-dim tensor)."""
    if not isinstance(value, Tensor):
        return float(value), None
    return (0.0, value.detach()) if value.device == device else (float(value), None)


def float_or_rows(
    name: str, value: float | Tensor, images: Tensor
) -> tuple[float, Tensor | None, int]:
    """A kernel's three arguments for a number of each sample: (value, None, 0), or (unused, a 0-dim
    or (B,) tensor, how far apart its entries are). Raises as :func:`.rows.check_rows` does."""
    check_rows(name, value, images)
    if not isinstance(value, Tensor) or value.dim() == 0:
        return *float_or_pointer(value, images.device), 0
    rows = value.detach().to(images.device)
    return 0.0, rows, rows.stride(0)


def int_or_pointer(value: int | Tensor, device: torch.device) -> tuple[int, Tensor | None]:
    """:func:`float_or_pointer` for a 64-bit integer; Python integers are wrapped to the signed
    range."""
    if isinstance(value, Tensor) and value.device == device:
        return 0, value
    return (int(value) + 2**63) % 2**64 - 2**63, None


def aligned(*lists: Sequence[Tensor]) -> bool:
    """True if all pointers and sizes allow 128-bit access."""
    return all(t.data_ptr() % 16 == 0 and t.numel() % 16 == 0 for each in lists for t in each)
