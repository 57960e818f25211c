"""The Triton kernels under the names and signatures of the references, differentiable in eager.

A second derivative (``create_graph=True``) goes through the reference's expression.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from . import reference, triton_losses
from .triton_crop import crop_flip, crop_flip_add, crop_flip_ascend, crop_flip_write
from .triton_l2 import l2_project, l2_start, l2_step
from .triton_linf import linf_project, linf_step
from .triton_losses import (
    masked_ce_backward,
    masked_ce_forward,
    trades_kl_backward,
    trades_kl_forward,
)
from .triton_noise import linf_start, noise_normal, noise_uniform
from .triton_taps import block_noise, block_signs, block_step_gradients
from .triton_top_n import top_n_forward
from .triton_weights import perturb_weights, restore_weights


class _TopN(torch.autograd.Function):
    @staticmethod
    def forward(z: Tensor, z_adv: Tensor, n: int) -> tuple[Tensor, Tensor]:
        return top_n_forward(z, z_adv, n, True)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        ctx.mark_non_differentiable(output[1])
        ctx.save_for_backward(output[1])
        ctx.dtypes = (inputs[0].dtype, inputs[1].dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None]:
        direction = ctx.saved_tensors[0] * grads[0]
        return direction.to(ctx.dtypes[0]), (-direction).to(ctx.dtypes[1]), None


class _TradesKL(torch.autograd.Function):
    @staticmethod
    def forward(logits_p: Tensor, logits_q: Tensor) -> Tensor:
        return trades_kl_forward(logits_p, logits_q)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        pair, wants = ctx.saved_tensors, ctx.needs_input_grad
        if torch.is_grad_enabled():
            return _through_reference(reference.trades_kl(*pair), pair, wants, grads[0])
        found = triton_losses.trades_kl_backward(grads[0], *pair, *wants)
        return tuple(g if want else None for g, want in zip(found, wants, strict=True))


class _MaskedCE(torch.autograd.Function):
    @staticmethod
    def forward(logits: Tensor, y: Tensor, c_min: float | Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return masked_ce_forward(logits, y, c_min)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.mark_non_differentiable(*output[1:])
        ctx.save_for_backward(*inputs[:2], output[2])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, None, None]:
        logits, y, kept = ctx.saved_tensors
        if torch.is_grad_enabled():
            # The mask of the forward pass, whatever c_min holds by now.
            loss = torch.nn.functional.cross_entropy(logits.float(), y, reduction="none")
            total = torch.where(kept != 0, loss, 0.0).sum() / len(y)
            return _through_reference(total, (logits,), (True,), grads[0])[0], None, None
        return masked_ce_backward(grads[0], logits, y, kept), None, None


def _through_reference(
    value: Tensor, inputs: tuple[Tensor, ...], wants: tuple[bool, ...], grad: Tensor
) -> tuple[Tensor | None, ...]:
    wanted = [t for t, want in zip(inputs, wants, strict=True) if want]
    found = iter(torch.autograd.grad(value, wanted, grad, create_graph=True))
    return tuple(next(found) if want else None for want in wants)


def _tracked(*tensors: Tensor) -> bool:
    return torch.is_grad_enabled() and any(t.requires_grad for t in tensors)


def top_n_sum(z: Tensor, z_adv: Tensor, n: int) -> Tensor:
    """See ``reference.top_n_sum``."""
    if not _tracked(z, z_adv):
        return top_n_forward(z, z_adv, n, False)[0]
    total: Tensor = _TopN.apply(z, z_adv, n)[0]
    return total


def trades_kl(logits_p: Tensor, logits_q: Tensor) -> Tensor:
    """See ``reference.trades_kl``."""
    kl: Tensor = _TradesKL.apply(logits_p, logits_q)
    return kl


def masked_ce(logits: Tensor, y: Tensor, c_min: float | Tensor) -> tuple[Tensor, Tensor]:
    """See ``reference.masked_ce``."""
    total, count, _kept = _MaskedCE.apply(logits, y, c_min)
    return total, count


FUNCTIONS: dict[str, Callable[..., Any]] = {
    "block_noise": block_noise,
    "block_signs": block_signs,
    "block_step_gradients": block_step_gradients,
    "crop_flip": crop_flip,
    "crop_flip_add": crop_flip_add,
    "crop_flip_ascend": crop_flip_ascend,
    "crop_flip_write": crop_flip_write,
    "l2_project": l2_project,
    "l2_start": l2_start,
    "l2_step": l2_step,
    "linf_project": linf_project,
    "linf_start": linf_start,
    "linf_step": linf_step,
    "masked_ce": masked_ce,
    "masked_ce_backward": masked_ce_backward,
    "masked_ce_forward": masked_ce_forward,
    "noise_normal": noise_normal,
    "noise_uniform": noise_uniform,
    "perturb_weights": perturb_weights,
    "restore_weights": restore_weights,
    "top_n_forward": top_n_forward,
    "top_n_sum": top_n_sum,
    "trades_kl": trades_kl,
    "trades_kl_backward": trades_kl_backward,
    "trades_kl_forward": trades_kl_forward,
}
