# mypy: allow-untyped-defs
# (a Triton kernel's parameters are not Python values)
"""BatchNorm with its ReLU and its residuals (Triton): two launches forward, two backward.

Activations are read as (rows, channels) with the channels side by side, that is in channels_last. A
tile is some rows of one block of channels. The kernels that sum go through the tiles in the order
of memory, each program with a stride of all programs, and the kernels that follow them go through
the tiles from the last to the first, so that they find the end of the activations in the cache.

The order of every sum depends on the shapes alone.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import reference_norm
from .reference_norm import Exchange
from .tickets import tickets
from .triton_common import launch

CHANNELS = 64  # of one block
PROGRAMS = 256  # of a kernel that sums
SUM_TILE, APPLY_TILE, WARPS = 2048, 4096, 8
SEVERAL = 4  # tiles that a kernel that sums reads at once


@triton.jit
def _block(blocks, channels, BLOCK_C: tl.constexpr):
    """(number of this program in its block of channels, the block, its channels, which of them
    exist)."""
    program = tl.program_id(0) // blocks
    block = tl.program_id(0) % blocks
    channel = block * BLOCK_C + tl.arange(0, BLOCK_C)
    return program, block, channel, channel < channels


@triton.jit
def _tile(tile, rows, channels, channel, exists, EVEN: tl.constexpr, BLOCK_M: tl.constexpr):
    """(places of a tile, its mask); ``EVEN`` promises that nothing is outside."""
    first = (tile + rows * 0) * BLOCK_M  # in 64 bits, as ``rows``
    row = tl.arange(0, BLOCK_M)
    inside = (row < tl.minimum(rows - first, BLOCK_M).to(tl.int32))[:, None] & exists[None, :]
    if EVEN:
        inside = tl.full(inside.shape, True, tl.int1)
    return first * channels + (row[:, None] * channels + channel[None, :]), inside


@triton.jit
def _tiles(
    tile, programs, rows, channels, channel, exists,
    EVEN: tl.constexpr, SEVERAL: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """``_tile`` of a program's next ``SEVERAL`` tiles, one below the other: they are loaded
    together."""
    first = (tile + rows * 0) * BLOCK_M
    row = tl.arange(0, SEVERAL * BLOCK_M)
    row = row // BLOCK_M * (programs * BLOCK_M) + row % BLOCK_M
    left = tl.minimum(rows - first, SEVERAL * BLOCK_M * programs).to(tl.int32)
    inside = (row < left)[:, None] & exists[None, :]
    if EVEN:
        inside = tl.full(inside.shape, True, tl.int1)
    return first * channels + (row[:, None] * channels + channel[None, :]), inside


@triton.jit
def _sum_tiles(values, SEVERAL: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr):
    """The sum of several tiles, elementwise: the terms of one place belong to one thread."""
    return tl.sum(tl.reshape(values, [SEVERAL, BLOCK_M, BLOCK_C]), axis=0)


@triton.jit
def _rows_of(program, programs, rows, tiles, EVEN: tl.constexpr, BLOCK_M: tl.constexpr):
    """How many rows a program reads, as float32."""
    if EVEN:
        return (program * 0 + rows // programs).to(tl.float32)
    last = (tiles - 1) % programs == program
    absent = (tiles + rows * 0) * BLOCK_M - rows
    mine = (tiles - program + programs - 1) // programs * BLOCK_M
    return (mine - tl.where(last, absent, 0)).to(tl.float32)


@triton.jit
def _parts(
    programs, channels, channel, exists, EVEN: tl.constexpr, PADDED: tl.constexpr
):  # fmt: skip
    """(places of what the programs found, their mask)."""
    other = tl.arange(0, PADDED)
    every = (other < programs)[:, None] & exists[None, :]
    if EVEN:
        every = tl.full(every.shape, True, tl.int1)
    return other[:, None] * channels + channel[None, :], every


@triton.jit
def _affine(
    mean, spread, weight, bias, eps, channel, exists,
    EPS: tl.constexpr, WEIGHT: tl.constexpr, BIAS: tl.constexpr,
):  # fmt: skip
    """(mean, rate, scale, shift) of each channel: z = (x - mean) * scale + shift."""
    center = tl.load(mean + channel, mask=exists, other=0.0).to(tl.float32)
    rate = tl.load(spread + channel, mask=exists, other=1.0).to(tl.float32)
    if EPS:
        rate = tl.div_rn(1.0, tl.sqrt_rn(rate + eps))
    scale = rate
    if WEIGHT:
        scale = rate * tl.load(weight + channel, mask=exists, other=0.0).to(tl.float32)
    shift = tl.zeros_like(center)
    if BIAS:
        shift = tl.load(bias + channel, mask=exists, other=0.0).to(tl.float32)
    return center, rate, scale, shift


@triton.jit
def _masked(g, shown):
    """The gradient behind a ReLU; a NaN lets it through."""
    return tl.where(shown.to(tl.float32) <= 0, 0.0, g)


@triton.jit
def _sum_of(x, before, total, at, inside, BEFORE: tl.constexpr):
    """A tile of ``total`` in float32: rounded and stored if it is a sum."""
    found = tl.load(x + at, mask=inside, other=0.0)
    if BEFORE:
        added = tl.load(before + at, mask=inside, other=0.0).to(tl.float32)
        found = (found.to(tl.float32) + added).to(x.dtype.element_ty)
        tl.store(total + at, found, mask=inside)
    return found.to(tl.float32)


@triton.jit
def _statistics_kernel(
    x, before, total, means, squares, ticket, mean, spread, running_mean, running_var,
    momentum, eps, rows: tl.int64, channels, blocks, tiles, programs,
    BEFORE: tl.constexpr, MOMENTS: tl.constexpr, EVEN: tl.constexpr, SEVERAL: tl.constexpr,
    PADDED: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    program, block, channel, exists = _block(blocks, channels, BLOCK_C)
    # Distances from a value near the mean are summed, since the squares of the values themselves
    # cancel where the mean is large. It is the mean of the first tile: that has a fixed share of
    # the rows, so its distance from the mean of all is bounded in terms of the deviation.
    at, inside = _tile(program, rows, channels, channel, exists, EVEN, BLOCK_M)
    values = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
    if BEFORE:
        values += tl.load(before + at, mask=inside, other=0.0).to(tl.float32)
    here = tl.minimum(rows - (program + rows * 0) * BLOCK_M, BLOCK_M).to(tl.float32)
    pivot = tl.div_rn(tl.sum(values, axis=0), here)
    sums = tl.zeros([BLOCK_M, BLOCK_C], tl.float32)
    products = tl.zeros([BLOCK_M, BLOCK_C], tl.float32)
    for tile in range(program, tiles, programs * SEVERAL):
        those, there = _tiles(
            tile, programs, rows, channels, channel, exists, EVEN, SEVERAL, BLOCK_M
        )
        read = _sum_of(x, before, total, those, there, BEFORE)
        distance = tl.where(there, read - pivot[None, :], 0.0)
        sums += _sum_tiles(distance, SEVERAL, BLOCK_M, BLOCK_C)
        products += _sum_tiles(distance * distance, SEVERAL, BLOCK_M, BLOCK_C)
    count = _rows_of(program, programs, rows, tiles, EVEN, BLOCK_M)
    sum_here = tl.sum(sums, axis=0)
    offset = tl.div_rn(sum_here, count)
    deviation = tl.sum(products, axis=0) - sum_here * offset
    deviation = tl.maximum(deviation, 0.0, propagate_nan=tl.PropagateNan.ALL)
    own = program * channels + channel
    tl.store(means + own, pivot + offset, mask=exists)
    tl.store(squares + own, deviation, mask=exists)
    # The program that arrives last puts all of them together, in the order of their numbers.
    tl.debug_barrier()
    if tl.atomic_add(ticket + block, 1, sem="acq_rel") == programs - 1:
        tl.store(ticket + block, 0)
        other = tl.arange(0, PADDED)
        counts = _rows_of(other, programs, rows, tiles, EVEN, BLOCK_M)[:, None]
        place, every = _parts(programs, channels, channel, exists, EVEN, PADDED)
        number = rows.to(tl.float32)
        found = tl.load(squares + place, mask=every, other=0.0, cache_modifier=".cg")
        square = tl.sum(found, axis=0)
        found = tl.load(means + place, mask=every, other=0.0, cache_modifier=".cg")
        base = tl.load(means + channel, mask=exists, other=0.0, cache_modifier=".cg")
        shift = tl.where(every, (found - base[None, :]) * counts, 0.0)
        center = base + tl.div_rn(tl.sum(shift, axis=0), number)
        apart = tl.where(every, found - center[None, :], 0.0)
        square += tl.sum(apart * apart * counts, axis=0)
        tl.store(mean + channel, center, mask=exists)
        if MOMENTS:
            tl.store(spread + channel, square, mask=exists)
        else:
            var = tl.div_rn(square, number)
            tl.store(spread + channel, tl.div_rn(1.0, tl.sqrt_rn(var + eps)), mask=exists)
            if running_mean is not None:
                old = tl.load(running_mean + channel, mask=exists, other=0.0).to(tl.float32)
                new = (1 - momentum) * old + momentum * center
                tl.store(running_mean + channel, new.to(running_mean.dtype.element_ty), mask=exists)
            if running_var is not None:
                unbiased = tl.div_rn(square, number - 1)
                old = tl.load(running_var + channel, mask=exists, other=0.0).to(tl.float32)
                new = (1 - momentum) * old + momentum * unbiased
                tl.store(running_var + channel, new.to(running_var.dtype.element_ty), mask=exists)


@triton.jit
def _apply_kernel(
    total, after, y, mean, spread, weight, bias, eps, rows: tl.int64, channels, blocks, tiles,
    EPS: tl.constexpr, WEIGHT: tl.constexpr, BIAS: tl.constexpr, RELU: tl.constexpr,
    EVEN: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    number, _, channel, exists = _block(blocks, channels, BLOCK_C)
    at, inside = _tile(tiles - 1 - number, rows, channels, channel, exists, EVEN, BLOCK_M)
    x = tl.load(total + at, mask=inside, other=0.0).to(tl.float32)
    center, _, scale, shift = _affine(
        mean, spread, weight, bias, eps, channel, exists, EPS, WEIGHT, BIAS
    )
    z = (x - center[None, :]) * scale[None, :]
    if BIAS:
        z += shift[None, :]
    if after is not None:
        z += tl.load(after + at, mask=inside, other=0.0).to(tl.float32)
    if RELU:
        z = tl.maximum(z, 0.0, propagate_nan=tl.PropagateNan.ALL)
    tl.store(y + at, z.to(y.dtype.element_ty), mask=inside)


@triton.jit
def _reduce_kernel(
    grad, more, total, y, of_after, sums, products, ticket, through, of_weight, of_bias,
    mean, spread, weight, bias, eps, rows: tl.int64, channels, blocks, tiles, programs,
    EPS: tl.constexpr, WEIGHT: tl.constexpr, BIAS: tl.constexpr, RELU: tl.constexpr,
    MOMENTS: tl.constexpr, EVEN: tl.constexpr, SEVERAL: tl.constexpr,
    PADDED: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    program, block, channel, exists = _block(blocks, channels, BLOCK_C)
    center, rate, scale, shift = _affine(
        mean, spread, weight, bias, eps, channel, exists, EPS, WEIGHT, BIAS
    )
    g_sums = tl.zeros([BLOCK_M, BLOCK_C], tl.float32)
    g_products = tl.zeros([BLOCK_M, BLOCK_C], tl.float32)
    for tile in range(program, tiles, programs * SEVERAL):
        at, inside = _tiles(tile, programs, rows, channels, channel, exists, EVEN, SEVERAL, BLOCK_M)
        g = tl.load(grad + at, mask=inside, other=0.0).to(tl.float32)
        if more is not None:
            g += tl.load(more + at, mask=inside, other=0.0).to(tl.float32)
        x = tl.load(total + at, mask=inside, other=0.0).to(tl.float32)
        centered = x - center[None, :]
        if RELU:
            if y is not None:
                g = _masked(g, tl.load(y + at, mask=inside, other=0.0))
            else:
                z = centered * scale[None, :]
                if BIAS:
                    z += shift[None, :]
                g = _masked(g, z.to(total.dtype.element_ty))
        if of_after is not None:
            tl.store(of_after + at, g.to(of_after.dtype.element_ty), mask=inside)
        g_sums += _sum_tiles(g, SEVERAL, BLOCK_M, BLOCK_C)
        g_products += _sum_tiles(g * centered, SEVERAL, BLOCK_M, BLOCK_C)
    own = program * channels + channel
    tl.store(sums + own, tl.sum(g_sums, axis=0), mask=exists)
    tl.store(products + own, tl.sum(g_products, axis=0), mask=exists)
    tl.debug_barrier()
    if tl.atomic_add(ticket + block, 1, sem="acq_rel") == programs - 1:
        tl.store(ticket + block, 0)
        place, every = _parts(programs, channels, channel, exists, EVEN, PADDED)
        found = tl.load(sums + place, mask=every, other=0.0, cache_modifier=".cg")
        bias_found = tl.sum(found, axis=0)
        found = tl.load(products + place, mask=every, other=0.0, cache_modifier=".cg")
        weight_found = tl.sum(found, axis=0) * rate
        if of_weight is not None:
            tl.store(of_weight + channel, weight_found.to(of_weight.dtype.element_ty), mask=exists)
        if of_bias is not None:
            tl.store(of_bias + channel, bias_found.to(of_bias.dtype.element_ty), mask=exists)
        if not MOMENTS:
            bias_found = tl.div_rn(bias_found, rows.to(tl.float32))
            weight_found = tl.div_rn(rate * weight_found, rows.to(tl.float32))
        tl.store(through + channel, bias_found, mask=exists)
        tl.store(through + channels + channel, weight_found, mask=exists)


@triton.jit
def _input_gradient_kernel(
    grad, more, total, y, of_after, grad_total, of_total, through,
    mean, spread, weight, bias, eps, rows: tl.int64, channels, blocks, tiles,
    TRAINING: tl.constexpr,
    EPS: tl.constexpr, WEIGHT: tl.constexpr, BIAS: tl.constexpr, RELU: tl.constexpr,
    EVEN: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    number, _, channel, exists = _block(blocks, channels, BLOCK_C)
    at, inside = _tile(tiles - 1 - number, rows, channels, channel, exists, EVEN, BLOCK_M)
    g = tl.load(grad + at, mask=inside, other=0.0).to(tl.float32)
    if more is not None:
        g += tl.load(more + at, mask=inside, other=0.0).to(tl.float32)
    center, _, scale, shift = _affine(
        mean, spread, weight, bias, eps, channel, exists, EPS, WEIGHT, BIAS
    )
    if TRAINING or (RELU and y is None):
        centered = tl.load(total + at, mask=inside, other=0.0).to(tl.float32) - center[None, :]
    if RELU:
        if y is not None:
            g = _masked(g, tl.load(y + at, mask=inside, other=0.0))
        else:
            z = centered * scale[None, :]
            if BIAS:
                z += shift[None, :]
            g = _masked(g, z.to(total.dtype.element_ty))
    if of_after is not None:
        tl.store(of_after + at, g.to(of_after.dtype.element_ty), mask=inside)
    if TRAINING:
        through_mean = tl.load(through + channel, mask=exists, other=0.0)
        through_rate = tl.load(through + channels + channel, mask=exists, other=0.0)
        g = g - through_mean[None, :] - centered * through_rate[None, :]
    g *= scale[None, :]
    if grad_total is not None:
        g += tl.load(grad_total + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(of_total + at, g.to(of_total.dtype.element_ty), mask=inside)


def _rows(t: Tensor) -> Tensor:
    """``t`` (B,C,...) with the channels of one place side by side in memory; a copy if they are
    not."""
    if t.dim() == 4:
        return t.contiguous(memory_format=torch.channels_last)
    return t.movedim(1, -1).contiguous().movedim(-1, 1)


def _optional_rows(t: Tensor | None) -> Tensor | None:
    return None if t is None else _rows(t)


def _tiling(t: Tensor, size: int) -> tuple[tuple[int, int, int, int], dict[str, Any]]:
    """((rows, channels, blocks of channels, tiles), compile-time sizes) of ``t`` (B,C,...)."""
    channels = t.shape[1]
    rows = t.numel() // channels
    block_c = min(CHANNELS, triton.next_power_of_2(channels))
    block_m = min(size // block_c, triton.next_power_of_2(rows))
    blocks, tiles = triton.cdiv(channels, block_c), triton.cdiv(rows, block_m)
    return (rows, channels, blocks, tiles), {
        "EVEN": rows % block_m == 0 and channels % block_c == 0,
        "BLOCK_M": block_m,
        "BLOCK_C": block_c,
        "num_warps": max(1, min(WARPS, block_m * block_c // 256)),
    }


def _sum_tiling(t: Tensor) -> tuple[tuple[int, int, int, int, int], dict[str, Any]]:
    """``_tiling`` of a kernel that sums, and how many programs one block of channels has."""
    sizes, tiles = _tiling(t, SUM_TILE)
    rows, channels, blocks, count = sizes
    programs = max(1, min(PROGRAMS // blocks, count))
    padded = triton.next_power_of_2(programs)
    several = min(SEVERAL, triton.next_power_of_2(triton.cdiv(count, programs)))
    even = rows % (several * padded * tiles["BLOCK_M"]) == 0 and programs == padded
    more = {"EVEN": tiles["EVEN"] and even, "SEVERAL": several, "PADDED": padded}
    return (rows, channels, blocks, count, programs), tiles | more


def _channels(
    mean: Tensor, spread: Tensor, eps: float | None, weight: Tensor | None, bias: Tensor | None
) -> tuple[tuple[Any, ...], dict[str, bool]]:
    """The arguments of ``_affine``, and which of them count."""
    found = [mean if t is None else t for t in (mean, spread, weight, bias)]
    flags = {"EPS": eps is not None, "WEIGHT": weight is not None, "BIAS": bias is not None}
    return (*(t.detach().contiguous() for t in found), eps or 0.0), flags


def norm_statistics(
    x: Tensor,
    before: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    momentum: float,
    eps: float,
    exchange: Exchange | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """See ``reference_norm.norm_statistics``."""
    reference_norm.check_count(x, exchange)
    values, added = _rows(x), _optional_rows(before)
    total = x if added is None else torch.empty_like(values)
    sizes, tiles = _sum_tiling(values)
    _, channels, blocks, _, programs = sizes
    means, squares = values.new_empty((2, programs, channels), dtype=torch.float32)
    mean, spread = (values.new_empty(channels, dtype=torch.float32) for _ in range(2))
    buffers = [running_mean, running_var] if exchange is None else [None, None]
    moved = [None if t is None else t.detach().contiguous() for t in buffers]
    launch(
        _statistics_kernel, (blocks * programs,), values, added, None if added is None else total,
        means, squares,
        tickets(x.device, blocks), mean, spread, *moved, momentum, eps, *sizes, device=x.device,
        BEFORE=added is not None, MOMENTS=exchange is not None, enable_fp_fusion=True, **tiles,
    )  # fmt: skip
    for buffer, new in zip(buffers, moved, strict=True):
        _written(buffer, new)
    if exchange is not None:
        parts = exchange(torch.stack([torch.full_like(mean, sizes[0]), mean, spread]))
        mean, spread = reference_norm.merged(parts, running_mean, running_var, momentum, eps)
    return total, mean, spread


def _written(buffer: Tensor | None, used: Tensor | None) -> None:
    """Copy back what was not changed in place, and tell autograd that the buffer has changed."""
    if buffer is None or used is None:
        return
    if buffer.data_ptr() != used.data_ptr():
        buffer.detach().copy_(used)
    elif not buffer.is_inference():
        torch.autograd.graph.increment_version(buffer)


def norm_apply(
    total: Tensor,
    mean: Tensor,
    spread: Tensor,
    eps: float | None,
    weight: Tensor | None,
    bias: Tensor | None,
    after: Tensor | None,
    relu: bool,
) -> Tensor:
    """See ``reference_norm.norm_apply``."""
    values, added = _rows(total), _optional_rows(after)
    y = torch.empty_like(values)
    if not y.numel():
        return y
    sizes, tiles = _tiling(values, APPLY_TILE)
    channels, flags = _channels(mean, spread, eps, weight, bias)
    launch(
        _apply_kernel, (sizes[2] * sizes[3],), values, added, y, *channels, *sizes,
        device=total.device, RELU=relu, **flags, **tiles,
    )  # fmt: skip
    return y


def norm_gradients(
    grad: Tensor,
    total: Tensor,
    y: Tensor | None,
    mean: Tensor,
    spread: Tensor,
    eps: float | None,
    weight: Tensor | None,
    bias: Tensor | None,
    relu: bool,
    training: bool,
    grad_total: Tensor | None,
    wants_after: bool,
    wants_affine: bool,
    exchange: Exchange | None = None,
    more: Tensor | None = None,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """See ``reference_norm.norm_gradients``."""
    if not total.numel():
        return reference_norm.norm_gradients(
            grad, total, y, mean, spread, eps, weight, bias, relu, training, grad_total,
            wants_after, wants_affine, exchange, more,
        )  # fmt: skip
    device, g, values, shown = total.device, _rows(grad), _rows(total), _optional_rows(y)
    again = _optional_rows(more)
    channels, flags = _channels(mean, spread, eps, weight, bias)
    written = torch.empty_like(values) if wants_after and (relu or again is not None) else None
    # Without a ReLU the gradient of after is that of y.
    of_after = g if wants_after and written is None else written
    of_weight = _like(weight) if wants_affine else None
    of_bias = _like(bias) if wants_affine else None
    through = None
    if training or wants_affine:
        sizes, tiles = _sum_tiling(values)
        _, count, blocks, _, programs = sizes
        sums, products = values.new_empty((2, programs, count), dtype=torch.float32)
        through = values.new_empty((2, count), dtype=torch.float32)
        launch(
            _reduce_kernel, (blocks * programs,), g, again, values, shown, written, sums, products,
            tickets(device, blocks), through, of_weight, of_bias, *channels, *sizes, device=device,
            RELU=relu, MOMENTS=exchange is not None, **flags, **tiles,
        )  # fmt: skip
        if exchange is not None and training:
            through = _shared(through, sizes[0], _rate(spread, eps), exchange)
        if written is not None:  # behind the ReLU already
            g, again, shown, written, relu = written, None, None, None, False
    of_total, skipped = torch.empty_like(values), _optional_rows(grad_total)
    places, tiles = _tiling(values, APPLY_TILE)
    launch(
        _input_gradient_kernel, (places[2] * places[3],), g, again, values, shown, written,
        skipped, of_total, through, *channels, *places, device=device, TRAINING=training, RELU=relu,
        **flags, **tiles,
    )  # fmt: skip
    return of_total, of_after, of_weight, of_bias


def _like(parameter: Tensor | None) -> Tensor | None:
    return None if parameter is None else parameter.new_empty(parameter.shape)


def _rate(spread: Tensor, eps: float | None) -> Tensor:
    return spread if eps is None else torch.rsqrt(spread.float() + eps)


def _shared(own: Tensor, rows: int, rate: Tensor, exchange: Exchange) -> Tensor:
    """What the gradient for ``total`` loses through mean and rate, (2,C), from the gradients of
    bias and weight of all processes."""
    count, of_bias, of_weight = exchange(torch.cat([torch.full_like(own[:1], rows), own])).sum(0)
    return torch.stack([of_bias / count, rate * of_weight / count])
