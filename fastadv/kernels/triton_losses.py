# mypy: allow-untyped-defs
# (a Triton kernel's parameters are not Python values)
"""The divergence of TRADES and the masked cross entropy of RWP (Triton); each row of logits is read
once.

A second derivative (``create_graph=True``) goes through the expression of the reference.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import reference
from .layout import float_or_pointer
from .tickets import tickets
from .triton_common import launch, scalar

TILE = 2048


@triton.jit
def _tile(batch, classes, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """(rows, their mask, places, mask of the places, columns) of this program."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, COLUMNS)
    exists = row < batch
    inside = exists[:, None] & (column < classes)[None, :]
    return row, exists, row[:, None] * classes + column[None, :], inside, column


@triton.jit
def _log_softmax(z):
    """Shifted by the maximum first, or logits of 1e4 would lose four digits."""
    shifted = z - tl.max(z, axis=1)[:, None]
    return shifted - tl.log(tl.sum(tl.exp(shifted), axis=1))[:, None]


@triton.jit
def _logits(pointer, place, inside):
    return tl.load(pointer + place, mask=inside, other=-float("inf")).to(tl.float32)


@triton.jit
def _safe(z, exists):
    """Rows that do not exist as zeros, or their maximum would be -inf."""
    return tl.where(exists[:, None], z, 0.0)


@triton.jit
def _log_pair(logits_p, logits_q, place, inside, exists):
    log_p = _log_softmax(_safe(_logits(logits_p, place, inside), exists))
    log_q = _log_softmax(_safe(_logits(logits_q, place, inside), exists))
    # Columns that do not exist would give inf - inf.
    return tl.exp(log_p), tl.exp(log_q), tl.where(inside, log_p - log_q, 0.0)


@triton.jit
def _kl_forward_kernel(
    logits_p, logits_q, kl, batch, classes, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):  # fmt: skip
    row, exists, place, inside, _ = _tile(batch, classes, ROWS, COLUMNS)
    p, _q, difference = _log_pair(logits_p, logits_q, place, inside, exists)
    # sum_c p_c (log p_c - log q_c)
    tl.store(kl + row, tl.sum(p * difference, axis=1), mask=exists)


@triton.jit
def _kl_backward_kernel(
    grad, logits_p, logits_q, grad_p, grad_q, batch, classes,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    row, exists, place, inside, _ = _tile(batch, classes, ROWS, COLUMNS)
    g = tl.load(grad + row, mask=exists, other=0.0).to(tl.float32)[:, None]
    p, q, difference = _log_pair(logits_p, logits_q, place, inside, exists)
    if grad_q is not None:
        # d KL / d z_q = q - p
        value = g * (q - p)
        tl.store(grad_q + place, value.to(grad_q.dtype.element_ty), mask=inside)
    if grad_p is not None:
        # d KL / d z_p = p * (log p - log q - KL)
        value = g * (p * (difference - tl.sum(p * difference, axis=1)[:, None]))
        tl.store(grad_p + place, value.to(grad_p.dtype.element_ty), mask=inside)


@triton.jit
def _ce_forward_kernel(
    logits, y, c_min, c_min_ptr, total, count, kept, partials, counts, ticket,
    batch: tl.int64, classes, programs,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, PADDED: tl.constexpr,
):  # fmt: skip
    row, exists, place, inside, column = _tile(batch, classes, ROWS, COLUMNS)
    z = _safe(_logits(logits, place, inside), exists)
    label = tl.load(y + row, mask=exists, other=0)
    picked = tl.where(column[None, :] == label[:, None], _log_softmax(z), 0.0)
    loss = -tl.sum(picked, axis=1)
    keep = exists & (loss <= scalar(c_min, c_min_ptr))
    tl.store(kept + row, keep.to(tl.int8), mask=exists)
    sum_here = tl.sum(tl.where(keep, loss, 0.0), axis=0)
    count_here = tl.sum(keep.to(tl.int32), axis=0)
    if PADDED == 1:
        tl.store(total, tl.div_rn(sum_here, batch.to(tl.float32)))
        tl.store(count, count_here.to(tl.int64))
    else:
        program = tl.program_id(0)
        tl.store(partials + program, sum_here)
        tl.store(counts + program, count_here)
        # The program that arrives last adds up all of them, in the order of their numbers.
        tl.debug_barrier()
        if tl.atomic_add(ticket, 1, sem="acq_rel") == programs - 1:
            other = tl.arange(0, PADDED)
            there = other < programs
            sums = tl.load(partials + other, mask=there, other=0.0, cache_modifier=".cg")
            numbers = tl.load(counts + other, mask=there, other=0, cache_modifier=".cg")
            tl.store(total, tl.div_rn(tl.sum(sums, axis=0), batch.to(tl.float32)))
            tl.store(count, tl.sum(numbers, axis=0).to(tl.int64))
            tl.store(ticket, 0)


@triton.jit
def _ce_backward_kernel(
    grad, logits, y, kept, out, batch: tl.int64, classes,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    row, exists, place, inside, column = _tile(batch, classes, ROWS, COLUMNS)
    z = _safe(_logits(logits, place, inside), exists)
    label = tl.load(y + row, mask=exists, other=0)
    keep = tl.load(kept + row, mask=exists, other=0)
    hit = (column[None, :] == label[:, None]).to(tl.float32)
    share = tl.div_rn(tl.load(grad).to(tl.float32), batch.to(tl.float32))
    # m_i / B * (softmax - onehot); zero times a softmax that is NaN stays NaN, to be seen.
    value = tl.where(keep != 0, share, 0.0)[:, None] * (tl.exp(_log_softmax(z)) - hit)
    tl.store(out + place, value.to(out.dtype.element_ty), mask=inside)


def _tiling(logits: Tensor) -> tuple[int, dict[str, int]]:
    """(programs, compile-time sizes): several rows fill one tile, wide rows use more warps."""
    columns = triton.next_power_of_2(logits.shape[1])
    rows = max(1, min(TILE // columns, triton.next_power_of_2(logits.shape[0])))
    warps = max(1, min(16, rows * columns // 256))
    programs = triton.cdiv(logits.shape[0], rows)
    return programs, {"ROWS": rows, "COLUMNS": columns, "num_warps": warps}


def trades_kl_forward(logits_p: Tensor, logits_q: Tensor) -> Tensor:
    """KL per sample, (B,) float32."""
    p, q = logits_p.contiguous(), logits_q.contiguous()
    kl = torch.empty(p.shape[0], dtype=torch.float32, device=p.device)
    if p.shape[0]:
        programs, tiles = _tiling(p)
        launch(_kl_forward_kernel, (programs,), p, q, kl, *p.shape, device=p.device, **tiles)
    return kl


def trades_kl_backward(
    grad: Tensor, logits_p: Tensor, logits_q: Tensor, want_p: bool, want_q: bool
) -> tuple[Tensor, Tensor]:
    """The gradients by both logits; an unwanted one is empty."""
    p, q = logits_p.contiguous(), logits_q.contiguous()
    grad_p = torch.empty_like(p) if want_p else p.new_empty(0)
    grad_q = torch.empty_like(q) if want_q else q.new_empty(0)
    if p.shape[0] and (want_p or want_q):
        programs, tiles = _tiling(p)
        launch(
            _kl_backward_kernel, (programs,), grad.contiguous(), p, q,
            grad_p if want_p else None, grad_q if want_q else None, *p.shape, device=p.device,
            **tiles,
        )  # fmt: skip
    return grad_p, grad_q


def masked_ce_forward(
    logits: Tensor, y: Tensor, c_min: float | Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """(the masked sum / B, the count, the mask (B,) int8)."""
    z, device = logits.contiguous(), logits.device
    programs, tiles = _tiling(z)
    total = torch.empty((), dtype=torch.float32, device=device)
    count = torch.empty((), dtype=torch.int64, device=device)
    kept = torch.empty(z.shape[0], dtype=torch.int8, device=device)
    scratch: tuple[Tensor | None, ...] = (None, None, None)
    if programs > 1:
        scratch = (
            torch.empty(programs, dtype=torch.float32, device=device),
            torch.empty(programs, dtype=torch.int32, device=device),
            tickets(device, 1),
        )
    launch(
        _ce_forward_kernel, (programs,), z, y.contiguous(), *float_or_pointer(c_min, device),
        total, count, kept, *scratch, *z.shape, programs, device=device,
        PADDED=triton.next_power_of_2(programs), **tiles,
    )  # fmt: skip
    return total, count, kept


def masked_ce_backward(grad: Tensor, logits: Tensor, y: Tensor, kept: Tensor) -> Tensor:
    """The gradient of the masked sum / B by the logits; NaN in rows whose loss is NaN."""
    z = logits.contiguous()
    out = torch.empty_like(z)
    programs, tiles = _tiling(z)
    launch(
        _ce_backward_kernel, (programs,), grad, z, y.contiguous(), kept, out, *z.shape,
        device=z.device, **tiles,
    )  # fmt: skip
    return out


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
        found = trades_kl_backward(grads[0], *pair, *wants)
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
            # The mask of the forward pass, since ``c_min`` may have changed since.
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


def trades_kl(logits_p: Tensor, logits_q: Tensor) -> Tensor:
    """See ``reference.trades_kl``."""
    kl: Tensor = _TradesKL.apply(logits_p, logits_q)
    return kl


def masked_ce(logits: Tensor, y: Tensor, c_min: float | Tensor) -> tuple[Tensor, Tensor]:
    """See ``reference.masked_ce``."""
    total, count, _kept = _MaskedCE.apply(logits, y, c_min)
    return total, count
