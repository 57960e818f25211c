"""The guard around an update in Triton's interpreter against the reference."""

import itertools
import math
import random
from typing import Any

import pytest
import torch
from oracle import LAYOUTS, call, images, laid_out, one_by_one, poisoned
from torch import Tensor

from fastadv.kernels import triton_guard
from fastadv.kernels.tickets import tickets

SHAPES = ((64, 3, 3, 3), (10, 50), (1,), (), (9000,), (0,), (3,))
F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16
DTYPES = ((F32,) * 7, (F32, F16, BF16, F32, F16, BF16, F16))
CPU = torch.device("cpu")


def tensors(seed: int, dtypes: tuple[torch.dtype, ...] = DTYPES[0]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    found = [torch.randn(shape, generator=generator) for shape in SHAPES]
    found[0] = found[0].to(memory_format=torch.channels_last)
    return [t.to(dtype) for t, dtype in zip(found, dtypes, strict=True)]


def same_bits(first: list[Tensor], second: list[Tensor]) -> bool:
    pairs = zip(first, second, strict=True)
    return all(torch.equal(a.view(-1).view(torch.uint8) if a.dim() == 1 else a.nan_to_num(7.0),
                           b.view(-1).view(torch.uint8) if b.dim() == 1 else b.nan_to_num(7.0))
               for a, b in pairs)  # fmt: skip


def spoil(tensor: Tensor, place: int, value: float) -> None:
    if tensor.dim() == 4:
        tensor[place % 64, 1, 2, place % 3] = value
    else:
        tensor.view(-1)[place % tensor.numel()] = value


@pytest.mark.parametrize(("dtypes", "value"), one_by_one(DTYPES, [math.nan, math.inf, -math.inf]))
def test_one_value_that_is_not_finite_is_found(dtypes: Any, value: float) -> None:
    for which, shape in enumerate(SHAPES):
        if 0 in shape:
            continue
        given = tensors(0, dtypes)
        assert not call("not_finite", given, backend="triton")
        spoil(given[which], 8999, value)
        assert call("not_finite", given, backend="triton")
        assert call("not_finite", given, backend="reference")
        assert not tickets(CPU, 2).any()


def test_values_whose_sum_overflows_are_finite() -> None:
    for backend in ("triton", "reference"):
        assert not call("not_finite", [torch.full((9,), 3e38)], backend=backend)


@pytest.mark.parametrize("then", [0.0, math.inf, math.nan])
def test_what_was_not_finite_before_does_not_count(then: float) -> None:
    for backend in ("triton", "reference"):
        now, before = tensors(0), tensors(1)
        before[0] = before[0].contiguous()
        spoil(now[4], 5000, math.nan)
        spoil(before[4], 5000, then)
        assert bool(call("not_finite", now, before, backend=backend)) == math.isfinite(then)


def test_nothing_is_finite() -> None:
    assert not call("not_finite", [torch.zeros(0)], backend="triton")


def test_memory_with_gaps_is_read_where_it_has_values() -> None:
    wide = torch.full((4, 9), math.nan)
    wide[:, ::2] = 1.0
    assert not call("not_finite", [wide[:, ::2]], backend="triton")
    wide[3, 8] = math.inf
    assert call("not_finite", [wide[:, ::2]], backend="triton")


@pytest.mark.parametrize("listed", [192, 3])
@pytest.mark.parametrize("ok", [True, False])
@pytest.mark.parametrize("dtypes", DTYPES)
def test_put_back(dtypes: Any, ok: bool, listed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_guard, "LISTED", listed)
    now, copies = tensors(0, dtypes), tensors(1, dtypes)
    for each in (now, copies):
        each.append(torch.arange(5) + len(each[0]))  # a counter
        each.append(torch.arange(3)[:, None].expand(3, 2).clone())
    spoil(now[0], 3, math.nan)
    spoil(copies[4], 3, -0.0)
    copies[1] = laid_out(copies[1], "strided")
    versions = [t._version for t in now]
    expected = [t.clone() for t in (now if ok else copies)]
    call("put_back_unless", now, copies, torch.tensor(ok), backend="triton")
    assert same_bits(now, expected)
    assert all(t._version > v for t, v in zip(now, versions, strict=True) if t.numel())


def test_lists_that_do_not_fit_are_refused() -> None:
    for backend in ("triton", "reference"):
        with pytest.raises(ValueError, match="lists hold"):
            call("put_back_unless", tensors(0), tensors(0)[1:], torch.tensor(True), backend=backend)
        with pytest.raises(ValueError, match="shape"):
            call("not_finite", tensors(0), tensors(0)[::-1], backend=backend)


def signs_of(draw: random.Random) -> list[Tensor | None]:
    """Eleven kinds: absent, a flag, or a number."""
    kinds = [
        lambda: None,
        lambda: torch.tensor(draw.random() < 0.15),
        lambda: torch.tensor(draw.choice([1.0] * 9 + [math.inf, math.nan])),
        lambda: torch.tensor(draw.choice([1.0] * 9 + [-math.inf]), dtype=torch.float64),
    ]
    return [draw.choice(kinds)() for _ in range(11)]


def test_faults_are_recorded_as_by_the_reference() -> None:
    recorded = 0
    for seed in range(60):
        draw = random.Random(seed)
        signs = signs_of(draw)
        marks = [draw.random() < 0.8 for _ in signs]
        ok = draw.choice([None, torch.tensor(True), torch.tensor(False)])
        start = draw.choice([-1, -1, 3])
        found = []
        for backend in ("triton", "reference"):
            bad_step, kind = torch.tensor(start), torch.tensor(2)
            update = torch.tensor(2**40 + seed)
            with poisoned():
                results = call(
                    "record_fault", bad_step, kind, update, signs, marks, ok, backend=backend
                )
            found.append([int(bad_step), int(kind), *(float(each) for each in results)])
        assert found[0] == found[1], seed
        recorded += found[0][0] > 3
    assert 10 < recorded < 50


def test_the_first_kind_is_named_and_the_first_update_stays() -> None:
    bad_step, kind = torch.tensor(-1), torch.tensor(0)
    signs = [None, torch.tensor(False), torch.tensor(math.nan), torch.tensor(True)]
    for update in (7, 8):
        fine, unfit = call(
            "record_fault", bad_step, kind, torch.tensor(update), signs, [True] * 4,
            backend="triton",
        )  # fmt: skip
        assert (int(bad_step), int(kind), bool(fine), float(unfit)) == (7, 2, False, 1.0)


def looked(backend: str, x: Tensor, y: Any, rows: Any, homes: Any = (None,) * 3) -> tuple[Any, Any]:
    bad = [torch.tensor(True) for _ in range(3)]
    with poisoned():
        found = call(
            "look_at_batch", x, y, rows, (0.0, 1.0), 1e-5, 10, 5, 2**62, bad, homes,
            backend=backend,
        )  # fmt: skip
    return found, [bool(each) for each in bad]


@pytest.mark.parametrize(("count", "dtype", "layout"), one_by_one([3, 1, 300], [F32, F16], LAYOUTS))
def test_a_batch_is_clipped_and_looked_at(count: int, dtype: torch.dtype, layout: str) -> None:
    x = laid_out(images((count, 3, 9, 5), 0, dtype), layout)
    y, rows = torch.arange(count) % 10, torch.arange(count) * 2**50
    spoiled: list[tuple[Any, Any, Any]] = [(x, y, rows), (x, None, None)]
    for value in (1 + 5e-6, -5e-6, 1.1, -0.1, math.nan, math.inf):
        other = x.clone()
        other[-1, 2, 8, 4] = value
        spoiled.append((other, y, None))
    for label, row in itertools.product((-1, 10, 9), (-1, 2**62, 0)):
        some_y, some_rows = y.clone(), rows.clone()
        some_y[-1], some_rows[0] = label, row
        spoiled.append((x, some_y, some_rows))
    seen = set()
    for given in spoiled:
        (found, bad), (plain, expected) = (looked(each, *given) for each in ("triton", "reference"))
        assert bad == expected
        seen.add(tuple(bad))
        for own, other in zip(found, plain, strict=True):
            if other is None:
                assert own is None
                continue
            torch.testing.assert_close(own, other, rtol=0, atol=0, equal_nan=True)
            if layout != "strided":
                assert own.stride() == other.stride()
        assert not tickets(CPU, 4).any()
    assert len(seen) == 5


def test_a_batch_is_written_where_it_is_wanted() -> None:
    x, y = images((3, 3, 4, 4), 0) * 1.000004, torch.tensor([0, 9, 3])
    homes = (torch.empty_like(x), torch.empty_like(y), torch.empty_like(y))
    for backend in ("triton", "reference"):
        found, _ = looked(backend, x, y, None, homes)
        assert all(own is home for own, home in zip(found, homes, strict=True))
        assert torch.equal(homes[0], x.clamp(0, 1))
        assert homes[2].tolist() == [5, 6, 7]


@pytest.mark.parametrize(
    ("shape", "dtype", "layout"), one_by_one([(3, 9, 5), (3, 40, 41)], [F32, F16], LAYOUTS)
)
def test_images_that_did_not_move(shape: Any, dtype: torch.dtype, layout: str) -> None:
    """In the middle of the ball, in a corner of it, in a corner of the box, in and out of both."""
    count, eps = 7, torch.tensor([0.1, 0.1, 0.05, 0.2, 0.1, 0.1, 0.1])
    x = images((count, *shape), 0, dtype) * 0.5 + 0.25
    start = x.clone()
    start[1] = x[1] + 0.1 * torch.where(images((1, *shape), 1)[0] < 0.5, -1, 1)
    start[2], x[2] = 1.5, 0.98  # clipped to 1, and one pixel at the distance eps
    x[2, 0, 0, 0] = 0.95
    start[3, 1] += 0.2
    end = start.clone()
    end[4, 2, 8, 4] += 0.01
    end[5, 0, 0, 0] = math.nan
    end[2] = 1.0
    for radius in (eps, 0.1, torch.tensor(0.1, dtype=torch.float64)):
        given = [laid_out(t, layout) for t in (end, start, x)]
        with poisoned():
            found = call("unmoved_images", *given, radius, 0.0, 1.0, backend="triton")
        plain = call("unmoved_images", *given, radius, 0.0, 1.0, backend="reference")
        assert found.tolist() == plain.tolist()
    assert plain.tolist() == [True, False, True, True, False, False, True]
