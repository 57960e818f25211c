"""Forward and backward of ``top_n_sum`` in plain PyTorch, for its registered operator.

``reference.top_n_sum`` computes the same in one differentiable expression.
"""

from typing import Any

import torch
from torch import Tensor

from .reference import compute_dtype


@torch.no_grad()
def top_n_forward(
    z: Tensor, z_adv: Tensor, n: int, want_kept: bool = True
) -> tuple[Tensor, Tensor]:
    """(the sum, its sub-gradient by z as int8 in the shape of z; empty if ``want_kept`` is False).

    The arguments and errors are those of ``reference.top_n_sum``.
    """
    if not 0 <= n <= z.numel():
        raise ValueError(f"n must be in 0..{z.numel()}, not {n}.")
    wide = compute_dtype(z.dtype)
    difference = (z.to(wide) - z_adv.to(wide)).flatten()
    chosen = difference.abs().sort(descending=True, stable=True).indices[:n]
    kept = torch.zeros(difference.shape if want_kept else (0,), dtype=torch.int8, device=z.device)
    if want_kept:
        kept = kept.index_copy(0, chosen, difference[chosen].sign().to(torch.int8)).view(z.shape)
    return difference[chosen].abs().sum(), kept


def empty_top_n(z: Tensor, z_adv: Tensor, n: int) -> tuple[Tensor, Tensor]:
    """Empty tensors like the results of :func:`top_n_forward`."""
    total = z.new_empty((), dtype=compute_dtype(z.dtype))
    return total, z.new_empty(z.shape, dtype=torch.int8)


def save_kept(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    """Save the sub-gradient for :func:`top_n_backward`; a ``setup_context`` of autograd."""
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(output[1])
    ctx.dtypes = (inputs[0].dtype, inputs[1].dtype)


def top_n_backward(ctx: Any, grad: Tensor, _kept: Tensor) -> tuple[Tensor, Tensor, None]:
    """The gradients by ``z`` and ``z_adv``: the saved signs times the gradient of the sum."""
    direction = ctx.saved_tensors[0] * grad
    return direction.to(ctx.dtypes[0]), (-direction).to(ctx.dtypes[1]), None
