"""Weight perturbation and block noise in Triton's interpreter against the reference."""

import math

import pytest
import torch
from oracle import DTYPES, assert_error_rule, call, gradients, poisoned, widened
from oracle import triton_and_reference as both
from torch import Tensor

SHAPES = ((64, 3, 3, 3), (10, 50), (1,), (7, 33, 5), (5000,), (0,), (3,))


def tensors(seed: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    found = [torch.randn(s, generator=torch.Generator().manual_seed(seed)) for s in SHAPES]
    found[0] = found[0].to(memory_format=torch.channels_last)
    return [t.to(dtype) for t in found]


def copies(found: list[Tensor]) -> list[Tensor]:
    return [t.clone() for t in found]


@pytest.mark.parametrize("scope", ["tensor", "global"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("gamma", [0.01, torch.tensor(0.3)])
def test_perturb_and_restore(scope: str, dtype: torch.dtype, gamma: float | Tensor) -> None:
    w, g = tensors(0, dtype), [t * 1e-3 for t in tensors(1, dtype)]
    g[1].zero_()
    g[0] = g[0].contiguous()
    runs = []
    for backend, double in (("triton", False), ("reference", False), ("reference", True)):
        weights, directions = copies(w), copies(g)
        if double:
            weights, directions = widened(weights), widened(directions)
        with poisoned():
            call("perturb_weights", weights, directions, gamma, scope, backend=backend)
        runs.append((weights, directions))
    for kernel, plain, exact in zip(*runs, strict=True):
        assert_error_rule(kernel, plain, exact)
    weights, directions = runs[0]
    assert not directions[1].any()
    versions = [t._version for t in weights]
    call("restore_weights", weights, w, directions, backend="triton")
    assert all(torch.equal(a, b) for a, b in zip(weights, w, strict=True))
    assert all(t._version > v for t, v in zip(weights, versions, strict=True))


def test_restore_keeps_what_the_optimizer_did() -> None:
    w, v = tensors(0), [t * 0.01 for t in tensors(1)]
    stepped = [a + b + 0.125 for a, b in zip(w, v, strict=True)]
    plain = copies(stepped)
    call("restore_weights", stepped, w, v, backend="triton")
    call("restore_weights", plain, w, v, backend="reference")
    assert all(torch.equal(a, b) for a, b in zip(stepped, plain, strict=True))
    torch.testing.assert_close(stepped, [t + 0.125 for t in w])


def test_restore_of_mixed_dtypes_rounds_once() -> None:
    """Weights that an optimizer moved far: w - fl(w0 + v) has more digits than a half type."""
    # The interpreter cuts bfloat16 off where a GPU rounds it.
    stepped, w, v = ([t for t in mixed(seed) if t.dtype != BF16] for seed in (2, 0, 1))
    plain = copies(stepped)
    call("restore_weights", stepped, w, v, backend="triton")
    call("restore_weights", plain, w, v, backend="reference")
    assert all(torch.equal(a, b) for a, b in zip(stepped, plain, strict=True))


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("scope", ["tensor", "global"])
def test_a_non_finite_direction_moves_nothing(bad: float, scope: str) -> None:
    runs = []
    for backend in ("triton", "reference"):
        weights, directions = tensors(0), tensors(1)
        directions[3][0, 0, 0] = bad
        call("perturb_weights", weights, directions, 0.1, scope, backend=backend)
        assert all(d.isfinite().all() for d in directions)
        assert torch.equal(weights[3], tensors(0)[3])
        runs.append((weights, directions))
    torch.testing.assert_close(runs[0], runs[1])


def test_a_perturbation_that_overflows_float16_is_zero() -> None:
    for backend in ("triton", "reference"):
        weights = [torch.full((4,), 6e4, dtype=torch.float16)]
        directions = [torch.tensor([1.0, 0, 0, 0], dtype=torch.float16)]
        call("perturb_weights", weights, directions, 10.0, backend=backend)
        assert not directions[0].any()
        assert (weights[0] == 6e4).all()


def test_every_run_is_bit_for_bit_the_same() -> None:
    runs = []
    for _ in range(2):
        weights, directions = tensors(0), tensors(1)
        call("perturb_weights", weights, directions, 0.1, "global", backend="triton")
        runs.append(weights)
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


@pytest.mark.parametrize("dtype", DTYPES)
def test_block_noise(dtype: torch.dtype) -> None:
    blocks = [gradients(s, i, dtype) for i, s in enumerate(((2, 4, 9, 7), (3, 5), (2, 3000), (1,)))]
    blocks[0] = blocks[0].to(memory_format=torch.channels_last)
    blocks[1][0, 0] = math.nan
    signs, plain = both("block_signs", blocks)
    assert signs[1][0, 0].isnan()
    signs[1][0, 0] = plain[1][0, 0] = 0.0
    assert all(torch.equal(a, b) for a, b in zip(signs, plain, strict=True))
    assert signs[0].stride() == blocks[0].stride()
    noise, plain = both("block_noise", signs, torch.tensor([0.1, -2.0, 0.0, 1e-4]))
    assert all(torch.equal(a, b) for a, b in zip(noise, plain, strict=True))
    blocks[1][0, 0] = 1.0
    signs[0] = signs[0].contiguous()
    kernel, plain = both("block_step_gradients", blocks, signs)
    exact = call("block_step_gradients", widened(blocks), widened(signs))
    assert_error_rule(kernel, plain, exact, slack=2e-7)


F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16
# One for each of SHAPES: the empty tensor and what comes after it among them.
MIXED = (F32, F16, BF16, F32, F16, BF16, F16)


def mixed(seed: int) -> list[Tensor]:
    """Under autocast the images are wide and the blocks narrow."""
    pairs = zip(tensors(seed), MIXED, strict=True)
    return [t.to(dtype) for t, dtype in pairs]


def test_block_noise_of_mixed_dtypes() -> None:
    blocks = mixed(0)
    signs, plain = both("block_signs", blocks)
    assert all(torch.equal(a, b) for a, b in zip(signs, plain, strict=True))
    assert [t.dtype for t in signs] == list(MIXED)
    noise, plain = both("block_noise", signs, torch.tensor([0.1, -2.0, 0.25, 1e-4, 3.0, 5.0, 0.0]))
    assert all(torch.equal(a, b) for a, b in zip(noise, plain, strict=True))
    signs[1] = signs[1].float()  # a gradient and its sign may also differ
    kernel, plain = both("block_step_gradients", blocks, signs)
    exact = call("block_step_gradients", widened(blocks), widened(signs))
    assert_error_rule(kernel, plain, exact, slack=2e-7)


@pytest.mark.parametrize("scope", ["tensor", "global"])
def test_weights_of_mixed_dtypes(scope: str) -> None:
    runs = []
    for backend, wide in (("triton", False), ("reference", False), ("reference", True)):
        weights, directions = mixed(0), [t * 1e-2 for t in mixed(1)]
        if wide:
            weights, directions = widened(weights), widened(directions)
        call("perturb_weights", weights, directions, 0.1, scope, backend=backend)
        runs.append((weights, directions))
    for kernel, plain, exact in zip(*runs, strict=True):
        assert_error_rule(kernel, plain, exact)
    weights, directions = runs[0]
    assert not torch.equal(weights[1], mixed(0)[1])
    call("restore_weights", weights, mixed(0), directions, backend="triton")
    assert all(torch.equal(a, b) for a, b in zip(weights, mixed(0), strict=True))


def test_without_a_perturbation_the_update_is_kept_bit_for_bit() -> None:
    """w0 + (w - w0) would round w away where the optimizer moved it far."""
    moved = torch.tensor([0.1234567, -3.3333333, 7.0e-5, 2.0])
    for backend in ("triton", "reference"):
        weights = [moved.clone()]
        call("restore_weights", weights, [torch.full((4,), 1e4)], [torch.zeros(4)], backend=backend)
        assert torch.equal(weights[0], moved), backend
