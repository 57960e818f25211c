"""Distances between the predictions of two sets of logits, (B,classes) each."""

from torch import Tensor

from fastadv import kernels


def jensen_shannon(first: Tensor, second: Tensor, temperature: float = 1.0) -> Tensor:
    """(KL(p1 || m) + KL(p2 || m)) / 2 per sample (B,), m = (p1 + p2)/2, p = softmax(z / T)."""
    log_p = (first / temperature).log_softmax(1)
    log_q = (second / temperature).log_softmax(1)
    p, q = log_p.exp(), log_q.exp()
    # The floor of the released Consistency code; without it 0 * log 0 would be NaN.
    log_m = ((p + q) / 2).clamp(min=1e-8).log()
    return ((p * (log_p - log_m)).sum(1) + (q * (log_q - log_m)).sum(1)) / 2


def kl(first: Tensor, second: Tensor) -> Tensor:
    """KL(softmax(first) || softmax(second)) per sample (B,), differentiable in both."""
    return kernels.trades_kl(first, second)
