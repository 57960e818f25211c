"""Forward and backward of the losses in plain PyTorch, one function per Triton launcher.

``fastadv.kernels.reference`` computes the same in one differentiable expression.
"""

import torch
from torch import Tensor

from fastadv.kernels import reference
from fastadv.kernels.reference import compute_dtype


def _log_softmax(logits: Tensor) -> Tensor:
    return logits.to(compute_dtype(logits.dtype)).log_softmax(1)


@torch.no_grad()
def trades_kl_forward(logits_p: Tensor, logits_q: Tensor) -> Tensor:
    """KL per sample, (B,)."""
    log_p, log_q = _log_softmax(logits_p), _log_softmax(logits_q)
    return (log_p.exp() * (log_p - log_q)).sum(1)


@torch.no_grad()
def trades_kl_backward(
    grad: Tensor, logits_p: Tensor, logits_q: Tensor, want_p: bool, want_q: bool
) -> tuple[Tensor, Tensor]:
    """The gradients by both logits; an unwanted one is empty."""
    log_p, log_q = _log_softmax(logits_p), _log_softmax(logits_q)
    p, g = log_p.exp(), grad[:, None]
    grad_p, grad_q = logits_p.new_empty(0), logits_q.new_empty(0)
    if want_q:
        grad_q = (g * (log_q.exp() - p)).to(logits_q.dtype)
    if want_p:
        difference = log_p - log_q
        divergence = (p * difference).sum(1, keepdim=True)
        grad_p = (g * (p * (difference - divergence))).to(logits_p.dtype)
    return grad_p, grad_q


@torch.no_grad()
def masked_ce_forward(
    logits: Tensor, y: Tensor, c_min: float | Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """(masked sum / B, count, the mask (B,) int8)."""
    total, count = reference.masked_ce(logits, y, c_min)
    loss = -_log_softmax(logits).gather(1, y[:, None])[:, 0]
    return total, count, (loss <= c_min).to(torch.int8)


@torch.no_grad()
def masked_ce_backward(grad: Tensor, logits: Tensor, y: Tensor, kept: Tensor) -> Tensor:
    """The gradient of the masked sum / B by the logits; NaN in rows whose loss is NaN."""
    miss = _log_softmax(logits).exp()
    miss = miss.scatter_add(1, y[:, None], -torch.ones_like(miss[:, :1]))
    # Not where() around the product: zero times NaN must be seen, kept or not.
    share = torch.where(kept[:, None] != 0, grad / len(y), 0.0)
    return (share * miss).to(logits.dtype)
