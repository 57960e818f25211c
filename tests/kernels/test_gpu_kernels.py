"""Every Triton kernel on a GPU against its reference on the CPU, launched and replayed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from norm_calls import activations, by_entries, by_torch
from test_operators import (
    PUBLIC_CALLS,
    VIEW,
    channels_last,
    images,
    layers,
    logits,
    store,
    tensors,
)
from torch import Tensor

from fastadv import kernels
from fastadv.kernels import reference
from fastadv.kernels.dispatch import OPERATORS

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def large_images(seed: int) -> Tensor:
    return random(2, 3, 223, 225, seed=seed).sigmoid()


def medium_images(seed: int) -> Tensor:
    """About as many pixels as one program of the L2 step holds."""
    return random(2, 4, 64, 64, seed=seed).sigmoid()


def large_logits(seed: int) -> Tensor:
    return random(511, 1000, seed=seed)


def large_windows(seed: int) -> Tensor:
    """In channels_last; several programs write one."""
    return random(3, 3, 33, 31, seed=seed).sigmoid().to(memory_format=torch.channels_last)


def mixed(seed: int) -> list[Tensor]:
    """Under autocast the images are float32 and the blocks bfloat16; one is channels_last."""
    narrow = [random(16, 64, 32, 32, seed=seed + k).bfloat16() for k in range(3)]
    return [large_images(seed) - 0.5, *narrow[:2], channels_last(narrow[2])]


def signs(seed: int) -> list[Tensor]:
    return [tensor.sign() for tensor in mixed(seed)]


def narrow_layers(seed: int) -> list[Tensor]:
    """A wide layer and narrow ones."""
    narrow = [random(64, 64, 3, 3, seed=seed + k).bfloat16() for k in range(8)]
    return [random(512, 512, seed=seed), *narrow[:7], channels_last(narrow[7])]


Y = torch.arange(511) % 1000
RADII = torch.tensor([0.2, 0.1])
# Sizes at which more than one program works on a sample, a list or a batch.
LARGE: dict[str, tuple[str, Callable[[], tuple[Any, ...]]]] = {
    "linf_step": (
        "linf_step",
        lambda: (large_images(0), large_images(1) - 0.5, large_images(2), 0.1, RADII),
    ),
    "l2_step": (
        "l2_step",
        lambda: (large_images(0), large_images(1) - 0.5, large_images(2), RADII, 0.2),
    ),
    "l2_step in one program": (
        "l2_step",
        lambda: (*(medium_images(seed) for seed in (0, 1, 2)), RADII, 0.2),
    ),
    "l2_start": ("l2_start", lambda: (large_images(0), RADII, torch.tensor([9, 4]), 1, 2)),
    "linf_start": ("linf_start", lambda: (large_images(0), 0.5, torch.tensor([9, 4]), 1, 2)),
    "top_n_sum": ("top_n_sum", lambda: (large_logits(0), large_logits(1), 51_100)),
    "top_n_sum of ties": (
        "top_n_sum",
        lambda: (large_logits(0).round(), large_logits(1).round(), 9_999),
    ),
    "trades_kl": ("trades_kl", lambda: (large_logits(0), large_logits(1))),
    "pad_channels": ("pad_channels", lambda: (large_images(0), 8, torch.bfloat16)),
    "masked_ce": ("masked_ce", lambda: (large_logits(0), Y, 7.0)),
    "perturb_weights": (
        "perturb_weights",
        lambda: (
            *([random(64, 64, 3, 3, seed=seed + k) for k in range(40)] for seed in (0, 50)),
            *(0.1, "global"),
        ),
    ),
    "block_signs of mixed dtypes": (
        "block_signs",
        lambda: (mixed(0),),
    ),
    "block_noise of mixed dtypes": (
        "block_noise",
        lambda: (signs(0), torch.tensor([0.1, -2.0, 1e-4, 3.0])),
    ),
    "block_step_gradients of mixed dtypes": (
        "block_step_gradients",
        lambda: (mixed(0), signs(0)),
    ),
    "perturb_weights of mixed dtypes": (
        "perturb_weights",
        lambda: (narrow_layers(0), narrow_layers(50), 0.1, "tensor"),
    ),
    "restore_weights of mixed dtypes": (
        "restore_weights",
        lambda: (narrow_layers(0), narrow_layers(50), narrow_layers(100)),
    ),
    "crop_flip to channels_last": (
        "crop_flip",
        lambda: (store(torch.uint8, 40, 38), *VIEW, (33, 31)),
    ),
    "crop_flip_add of channels_last": (
        "crop_flip_add",
        lambda: (store(h=40, w=38), *VIEW, large_windows(0), 0.3, 0.1),
    ),
    "crop_flip_write of channels_last": (
        "crop_flip_write",
        lambda: (store(h=40, w=38), *VIEW, large_windows(0), torch.tensor(True)),
    ),
    "crop_flip_ascend of channels_last": (
        "crop_flip_ascend",
        lambda: (store(h=40, w=38), *VIEW, large_windows(0) - 0.5, 0.3),
    ),
    "block_step_gradients": (
        "block_step_gradients",
        lambda: ([random(16, 64, 32, 32)] * 3, [random(16, 64, 32, 32).sign()] * 3),
    ),
}
HALVES = (torch.float16, torch.bfloat16)


def norm_scales(channels: int) -> tuple[Tensor, ...]:
    """(mean, rate, weight, bias)"""
    return tuple(random(channels, seed=s).exp() for s in range(4))


def norm_calls(name: str, *shape: int, dtype: torch.dtype) -> dict[str, Any]:
    """The three entries of BatchNorm with everything that they can do, on one layer."""

    def layer(seed: int) -> Tensor:
        return channels_last(random(*shape, seed=seed).to(dtype))

    def statistics() -> tuple[Any, ...]:
        return (
            layer(0) + 3,
            layer(1),
            *(random(shape[1], seed=s).exp() for s in (2, 3)),
            0.1,
            1e-5,
        )

    def apply() -> tuple[Any, ...]:
        mean, rate, weight, bias = norm_scales(shape[1])
        return layer(0) + 3, mean, rate, None, weight, bias, layer(1), True

    def gradients() -> tuple[Any, ...]:
        mean, rate, weight, bias = norm_scales(shape[1])
        given = (layer(2) / 16, layer(0) + 1, layer(1), mean, rate, None, weight, bias)
        return *given, True, True, layer(3) / 16, True, True

    makers = {"statistics": statistics, "apply": apply, "gradients": gradients}
    return {f"norm_{k} {name}": (f"norm_{k}", make) for k, make in makers.items()}


LARGE |= norm_calls("in bfloat16", 16, 64, 32, 32, dtype=torch.bfloat16)
LARGE |= norm_calls("in float16", 16, 512, 4, 4, dtype=torch.float16)
LARGE |= norm_calls("in float32", 9, 100, 15, 17, dtype=torch.float32)
CALLS = {name: (name, call) for name, call in PUBLIC_CALLS.items()}
CALLS |= {f"large {name}": call for name, call in LARGE.items()}
OPTIONS = {"large crop_flip to channels_last": {"channels_last": True}}


def moved(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.cuda()
    if isinstance(value, (list, tuple)):
        return type(value)(moved(each) for each in value)
    return value


def on_cpu(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.detach().cpu()
    if isinstance(value, (list, tuple)):
        return [on_cpu(each) for each in value]
    return value


def close(found: Any, expected: Any) -> None:
    """Equal in shape, dtype and strides; sums of many float32 are taken in another order, which may
    move a half type's value to its neighbour."""
    for own, other in zip(_flat(on_cpu([found])), _flat(on_cpu([expected])), strict=True):
        unit = torch.finfo(other.dtype).eps if other.dtype in HALVES else 2e-5
        torch.testing.assert_close(own, other, rtol=unit, atol=unit, check_stride=True)


def run(name: str, arguments: tuple[Any, ...]) -> Any:
    return getattr(kernels, CALLS[name][0])(*arguments, **OPTIONS.get(name, {}))


def run_reference(name: str, arguments: tuple[Any, ...]) -> Any:
    return OPERATORS[CALLS[name][0]].reference(*arguments, **OPTIONS.get(name, {}))


@pytest.mark.parametrize("name", CALLS)
def test_a_kernel_is_its_reference(name: str) -> None:
    _function, make = CALLS[name]
    arguments, given = make(), moved(make())
    expected = run_reference(name, arguments)
    found = run(name, given)
    close(found, expected)
    close(tensors(given), tensors(arguments))  # what was changed in place


@pytest.mark.parametrize("name", CALLS)
def test_a_kernel_replayed_is_the_kernel(name: str) -> None:
    """Twice with the same inputs: a counter or histogram that is not cleared would show."""
    _function, make = CALLS[name]
    given, again = moved(make()), moved(make())
    expected = run(name, given)
    run(name, moved(make()))  # compiled on the way, not in the capture
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = run(name, again)
    for _ in range(2):
        for tensor, fresh in zip(_flat(again), _flat(moved(make())), strict=True):
            tensor.copy_(fresh)
        graph.replay()
        torch.testing.assert_close(found, expected)
        torch.testing.assert_close(tensors(again), tensors(given))


def _flat(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    return [t for each in value for t in _flat(each)] if isinstance(value, (list, tuple)) else []


def test_a_replay_reads_the_number_of_the_draw() -> None:
    x, rows = images(0).cuda(), torch.tensor([3, 0, 5]).cuda()
    offset = torch.zeros((), dtype=torch.int64, device="cuda")
    kernels.linf_start(x, 0.1, rows, 1, offset)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = kernels.linf_start(x, 0.1, rows, 1, offset)
    for number in (5, 2**40):
        offset.fill_(number)
        graph.replay()
        expected = reference.linf_start(x.cpu(), 0.1, rows.cpu(), 1, number)
        assert torch.equal(found.cpu(), expected)


@pytest.mark.parametrize("name", ["top_n_sum", "trades_kl", "masked_ce"])
def test_gradients_are_the_references(name: str) -> None:
    def gradients(function: Callable[..., Any], device: str) -> list[Tensor]:
        first, second = (logits(seed).to(device).requires_grad_() for seed in (0, 1))
        last = {"top_n_sum": (second, 7), "trades_kl": (second,)}.get(
            name, (torch.arange(6, device=device) % 5, 1.5)
        )
        value = function(first, *last)
        value = value[0] if isinstance(value, tuple) else value
        weights = torch.arange(1, value.numel() + 1, device=device).view(value.shape)
        wanted = [first] if name == "masked_ce" else [first, second]
        return list(torch.autograd.grad((value * weights).sum(), wanted))

    close(gradients(getattr(kernels, name), "cuda"), gradients(OPERATORS[name].reference, "cpu"))


def test_weights_come_back_exactly() -> None:
    weights = moved([*layers(0), *layers(3)])
    before = [tensor.clone() for tensor in weights]
    directions = moved([*layers(1), *layers(4)])
    kernels.perturb_weights(weights, directions, 0.1, "global")
    assert not torch.equal(weights[0], before[0])
    kernels.restore_weights(weights, before, directions)
    assert all(torch.equal(own, old) for own, old in zip(weights, before, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
@pytest.mark.parametrize("ratio", [0.0, 1e3])
def test_batch_norm_is_no_less_exact_than_pytorchs(dtype: torch.dtype, ratio: float) -> None:
    """The error rule, against float64, with a mean that is large against the deviation too."""
    given = activations((64, 64, 32, 32), dtype, before=False, ratio=ratio).changed(moved)
    exact = by_torch(given.changed(Tensor.double), True, True)
    plain = by_torch(given, True, True)
    for own, other, right in zip(by_entries(given, True, True), plain, exact, strict=True):
        assert own.dtype == other.dtype
        size = right.abs().max().item()
        kind = dtype if own.dim() == 4 else torch.float32
        # Roundings of the result: sums in float32 take another order. In the interpreter at most
        # 2.5 of float32 and 0.5 of a half type are needed.
        slack = (4 if kind is torch.float32 else 1) * torch.finfo(kind).eps * max(1.0, size)
        allowed = 2 * (other - right).abs().max().item() + slack
        torch.testing.assert_close(own.double(), right, rtol=0, atol=max(allowed, 0.0))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_batch_norm_has_the_same_bits_in_every_run(dtype: torch.dtype) -> None:
    """Whichever program arrives last."""
    given = activations((64, 64, 32, 32), dtype).changed(moved)
    first = by_entries(given, True, True)
    for _ in range(20):
        again = by_entries(given, True, True)
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
