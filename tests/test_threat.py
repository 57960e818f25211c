"""The threat with tensors, channels and masks, against formulas written pixel by pixel."""

from __future__ import annotations

import dataclasses
import math
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from fastadv import kernels
from fastadv.algorithms.sample_state import SampleStore
from fastadv.errors import UserError
from fastadv.kernels.philox import sample_radius
from fastadv.threat import Threat

SHAPES = [(1, 3, 5, 7), (4, 3, 5, 7), (3, 1, 1, 1)]
DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]
LAYOUTS = [torch.contiguous_format, torch.channels_last]
KEY = (3, 5, 1)  # seed, offset, stream


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def images(shape: tuple[int, ...], seed: int = 0) -> Tensor:
    return torch.rand(shape, generator=generator(seed), dtype=torch.float64)


def gradients(shape: tuple[int, ...], seed: int = 1) -> Tensor:
    g = torch.randn(shape, generator=generator(seed), dtype=torch.float64)
    g.view(-1)[::9] = 0
    return g


def masks(shape: tuple[int, ...], channels: int = 1) -> Tensor:
    mask = images((shape[0], channels, *shape[2:]), 7) > 0.5
    mask[0] = shape[0] == 1  # the first of several images cannot move
    return mask


def operations(threat: Threat, x: Tensor, away: Tensor, g: Tensor, alpha: Any) -> list[Tensor]:
    """What every operation of ``threat`` gives."""
    start = threat.start(x, torch.arange(len(x)), *KEY)
    stepped = threat.step(start, g, x, alpha)
    projected = threat.project(away, x)
    far = threat.step(start, g, x, 100.0)
    return [
        *(start, stepped, projected, far, threat.clip(away)),
        *(threat.at_edge(each, x) for each in (start, far, projected)),
    ]


def number(value: Any, row: int) -> float:
    """A radius or step of one image."""
    return float(value[row] if isinstance(value, Tensor) and value.dim() else value)


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_radii_per_image_are_images_with_numbers_bit_for_bit(
    norm: str, shape: tuple[int, ...], dtype: torch.dtype, layout: torch.memory_format
) -> None:
    x, away, g = (
        t.to(dtype, memory_format=layout)
        for t in (images(shape), images(shape, 2) * 3 - 1, gradients(shape))
    )
    wide = torch.float64 if dtype is torch.float64 else torch.float32
    eps = images((shape[0],), 3).to(wide) * (0.2 if norm == "linf" else 2.0)
    alpha = images((shape[0],), 4).to(wide) * 0.1
    for radius, size in ((eps, alpha), (eps, 0.05), (0.1, alpha), (eps[0], alpha[0])):
        together = operations(Threat(norm, radius), x, away, g, size)
        for row in range(shape[0]):
            # All images with the numbers of one: a norm over a batch of one is summed differently.
            alone = Threat(norm, number(radius, row))
            expected = operations(alone, x, away, g, number(size, row))
            for found, wanted in zip(together, expected, strict=True):
                assert found.dtype == wanted.dtype
                assert torch.equal(found[row], wanted[row])


@pytest.mark.parametrize("mask", [None, masks((4, 3, 5, 7))])
@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_equal_channels_are_numbers_bit_for_bit(
    norm: str, dtype: torch.dtype, layout: torch.memory_format, mask: Tensor | None
) -> None:
    shape = (4, 3, 5, 7)
    x = images(shape).clamp(0.15, 0.85).to(dtype, memory_format=layout)
    away, g = ((t.to(dtype)) for t in (images(shape, 2) * 3 - 1, gradients(shape)))
    expected = operations(Threat(norm, 0.1, 0.15, 0.85, mask), x, away, g, 0.03)
    box = ((0.15,) * 3, (0.85,) * 3, mask)
    variants = [(Threat(norm, 0.1, *box), 0.03), (Threat(norm, 0.1, 0.15, *box[1:]), 0.03)]
    if norm == "linf":
        channels = torch.full((1, 3, 1, 1), 0.03, dtype=torch.float64)
        for eps in (0.1, (0.1,) * 3):
            variants += [(Threat(norm, eps, *box), alpha) for alpha in ((0.03,) * 3, channels)]
        variants.append((Threat(norm, (0.1,) * 3, 0.15, 0.85, mask), 0.03))
    for threat, alpha in variants:
        for found, wanted in zip(operations(threat, x, away, g, alpha), expected, strict=True):
            assert found.dtype == wanted.dtype
            assert torch.equal(found, wanted)


def by_hand(
    threat: Threat, x: Tensor, moved: Tensor, eps: list[list[float]], ends: list[list[float]]
) -> Tensor:
    """``moved`` (B,C,H,W) in the cube of eps[b][c] and the box of ends[c], with Python's floats."""
    rows = []
    for b, image in enumerate(moved.tolist()):
        for c, plane in enumerate(image):
            for i, line in enumerate(plane):
                for j, value in enumerate(line):
                    center = float(x[b, c, i, j])
                    inside = min(max(value, center - eps[b][c]), center + eps[b][c])
                    inside = min(max(inside, ends[c][0]), ends[c][1])
                    mask = threat.mask
                    if mask is not None and not mask[b, c % mask.shape[1], i, j]:
                        inside = center
                    rows.append(inside)
    return torch.tensor(rows, dtype=torch.float64).view(x.shape)


RADII: dict[str, tuple[Any, Callable[[int, int], float]]] = {
    "number": (0.1, lambda b, c: 0.1),
    "0-dim": (torch.tensor(0.1, dtype=torch.float64), lambda b, c: 0.1),
    "images": (torch.linspace(0, 0.3, 4, dtype=torch.float64), lambda b, c: 0.1 * b),
    "channels": ((0.05, 0.1, 0.2), lambda b, c: (0.05, 0.1, 0.2)[c]),
}
BOXES: dict[str, tuple[Any, Any]] = {
    "numbers": (0.0, 1.0),
    "channels": ((0.1, 0.0, 0.2), (0.8, 0.9, 1.0)),
    "low": ((0.1, 0.0, 0.2), 1.0),
}
SHAPE = (4, 3, 5, 7)


@pytest.mark.parametrize("channels", [None, 1, 3])
@pytest.mark.parametrize("box", BOXES)
@pytest.mark.parametrize("radius", RADII)
def test_linf_by_hand(radius: str, box: str, channels: int | None) -> None:
    eps, of = RADII[radius]
    low, high = BOXES[box]
    mask = None if channels is None else masks(SHAPE, channels)
    threat = Threat("linf", eps, low, high, mask)
    g, away = gradients(SHAPE), images(SHAPE, 2) * 3 - 1
    x = threat.clip(images(SHAPE))
    radii = [[of(b, c) for c in range(3)] for b in range(4)]
    ends = [[low if low == 0.0 else low[c], high if high == 1.0 else high[c]] for c in range(3)]

    def close(found: Tensor, moved: Tensor) -> None:
        expected = by_hand(threat, x, moved, radii, ends)
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-15)
        if mask is not None:
            assert torch.equal(torch.where(mask, 0, found), torch.where(mask, 0, x))

    noise = kernels.noise_uniform(torch.arange(4), (3, 5, 7), *KEY, torch.float64)
    each = torch.tensor(radii, dtype=torch.float64)[:, :, None, None]
    start = threat.start(x, torch.arange(4), *KEY)
    close(start, x + each * noise)
    close(threat.project(away, x), away)
    sizes = {
        "number": (0.07, 0.07),
        "0-dim": (torch.tensor(0.07, dtype=torch.float64), 0.07),
        "images": (each[:, 0, 0, 0] / 3, each[:, :1] / 3),
        "tuple": ((0.01, 0.02, 0.03), torch.tensor([0.01, 0.02, 0.03])[:, None, None].double()),
        "channels": (each[:1] / 3, each[:1] / 3),
    }
    for name, (alpha, same) in sizes.items():
        if name == "tuple":
            same = torch.tensor([0.01, 0.02, 0.03], dtype=torch.float64)[:, None, None]
        close(threat.step(start, g, x, alpha), start + same * g.sign())


@pytest.mark.parametrize("channels", [None, 1, 3])
@pytest.mark.parametrize("box", BOXES)
@pytest.mark.parametrize("radius", ["number", "0-dim", "images"])
def test_l2_by_hand(radius: str, box: str, channels: int | None) -> None:
    eps, of = RADII[radius]
    mask = None if channels is None else masks(SHAPE, channels)
    threat = Threat("l2", eps, *BOXES[box], mask)
    g, away, x = gradients(SHAPE), images(SHAPE, 2) * 3 - 1, threat.clip(images(SHAPE))
    kept = torch.ones(SHAPE, dtype=torch.bool) if mask is None else mask.expand(SHAPE)
    ends = [torch.as_tensor(e, dtype=torch.float64).view(-1, 1, 1) for e in BOXES[box]]

    def placed(b: int, delta: Tensor, length: float) -> Tensor:
        """x plus ``delta`` of the movable pixels, of at most ``length``, in the box."""
        norm = math.sqrt(sum(float(value) ** 2 for value in delta[kept[b]]))
        shorter = delta * min(1.0, length / norm) if norm else delta
        inside = torch.minimum(torch.maximum(x[b] + shorter, ends[0]), ends[1])
        return torch.where(kept[b], inside, x[b])

    noise = kernels.noise_normal(torch.arange(4), (3, 5, 7), *KEY, torch.float64)
    shares = sample_radius(torch.arange(4), *KEY).double()
    start = threat.start(x, torch.arange(4), *KEY)
    stepped = threat.step(away, g, x, 0.3)
    rows = threat.step(away, g, x, torch.tensor([0.3, 0.1, 0.2, 0.3], dtype=torch.float64))
    projected = threat.project(away, x)
    for b in range(4):
        direction = noise[b] * kept[b]
        if direction.any():
            direction /= direction.norm()
        close = {"rtol": 0, "atol": 1e-9}  # the published guard of a norm is 1e-10
        torch.testing.assert_close(
            start[b], placed(b, direction * of(b, 0) * shares[b], math.inf), **close
        )
        slope = g[b] * kept[b]
        if slope.any():
            slope /= slope.norm()
        for found, alpha in ((stepped, 0.3), (rows, (0.3, 0.1, 0.2, 0.3)[b])):
            wanted = placed(b, away[b] - x[b] + alpha * slope, of(b, 0))
            torch.testing.assert_close(found[b], wanted, **close)
        torch.testing.assert_close(projected[b], placed(b, away[b] - x[b], of(b, 0)), **close)
    for found in (start, stepped, rows, projected):
        assert torch.equal(found[~kept], x[~kept])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_a_fixed_pixel_keeps_its_value_whatever_the_gradient(norm: str, dtype: torch.dtype) -> None:
    x, mask = images(SHAPE).to(dtype), masks(SHAPE)
    g = gradients(SHAPE).to(dtype)
    g[~mask.expand(SHAPE)] = math.nan
    for box in BOXES.values():
        threat = Threat(norm, 0.2, *box, mask)
        inside = threat.clip(x)
        start = threat.start(inside, torch.arange(4), *KEY)
        for moved in (start, threat.step(start, g, inside, 0.1), threat.project(g * 0, inside)):
            assert moved.dtype == dtype
            assert torch.equal(torch.where(mask, 0, moved), torch.where(mask, 0, inside))
            assert not torch.equal(moved, inside)


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_an_attack_in_normalised_images_is_the_attack_in_pixels(norm: str) -> None:
    mean, std = (0.5, 0.4, 0.3), (0.2, 0.25, 0.4) if norm == "linf" else (0.25,) * 3
    means, stds = (torch.tensor(v, dtype=torch.float64).view(1, 3, 1, 1) for v in (mean, std))
    weight = torch.randn(5, 3 * 5 * 7, generator=generator(5), dtype=torch.float64)
    y = torch.arange(4)

    def attack(threat: Threat, x: Tensor, shift: Tensor | float, scale: Tensor | float) -> Tensor:
        x_adv = threat.start(x, torch.arange(4), *KEY)
        for _ in range(7):
            x_adv = x_adv.detach().requires_grad_()
            logits = (x_adv * scale + shift).flatten(1) @ weight.T
            loss = functional.cross_entropy(logits, y, reduction="sum")
            (g,) = torch.autograd.grad(loss, x_adv)
            x_adv = threat.step(x_adv.detach(), g, x, threat.pgd_alpha)
        return x_adv

    x = images(SHAPE)
    eps = 0.1 if norm == "linf" else 1.0
    expected = attack(Threat(norm, eps), x, 0.0, 1.0)
    threat = Threat.normalized(mean, std, norm, eps)
    found = attack(threat, (x - means) / stds, means, stds)
    # In L2 the published guard of a norm, 1e-10, does not scale with the gradient.
    close = 1e-12 if norm == "linf" else 1e-9
    torch.testing.assert_close(found * stds + means, expected, rtol=0, atol=close)
    assert threat.nominal == pytest.approx(eps / min(std))
    assert (expected - x).abs().max() > 0.02
    far = (x * 5 - 2 - means) / stds
    torch.testing.assert_close(
        threat.clip(far) * stds + means, (x * 5 - 2).clamp(0, 1), rtol=0, atol=1e-12
    )


EDGES: list[tuple[str, Any]] = [("linf", 0.1), ("linf", (0.1, 0.05, 0.2)), ("l2", 0.5)]


@pytest.mark.parametrize("channels", [None, 1, 3])
@pytest.mark.parametrize("box", BOXES)
@pytest.mark.parametrize(("norm", "eps"), EDGES)
def test_at_edge(norm: str, eps: Any, box: str, channels: int | None) -> None:
    mask = None if channels is None else masks(SHAPE, channels)
    threat = Threat(norm, eps, *BOXES[box], mask)
    x = threat.clip(images(SHAPE) * 0.2 + 0.4)
    kept = torch.ones(SHAPE, dtype=torch.bool) if mask is None else mask.expand(SHAPE)
    outward = gradients(SHAPE).abs() + 1
    corner = threat.step(x, outward, x, 9.0)
    assert threat.at_edge(corner, x).all()
    assert threat.at_edge(x, x).tolist() == [not row.any() for row in kept]
    if norm == "linf":
        # One movable pixel back inside: the image can move again.
        loose = corner.clone()
        for b in range(4):
            places = kept[b].nonzero()
            if len(places):
                loose[b][tuple(places[0])] = x[b][tuple(places[0])]
        assert threat.at_edge(loose, x).tolist() == [not row.any() for row in kept]


def test_at_edge_at_the_ends_of_a_box_per_channel() -> None:
    threat = Threat("linf", 0.3, (0.1, 0.0, 0.2), (0.8, 0.9, 1.0))
    ends = torch.tensor([0.8, 0.9, 1.0], dtype=torch.float64).view(1, 3, 1, 1)
    x = ends.repeat(2, 1, 2, 2)
    x[:, 0, 0, 0] = 0.5
    corner = x.clone()
    corner[:, 0, 0, 0] = 0.2
    assert threat.at_edge(corner, x).all()
    corner[1, 2, 1, 1] = 0.9  # inside of this channel's range, outside of no other's
    assert threat.at_edge(corner, x).tolist() == [True, False]


@pytest.mark.parametrize("mask", [False, True])
@pytest.mark.parametrize(
    "threat",
    [
        Threat("linf", 0.1),
        Threat("l2", 0.5),
        Threat.normalized((0.5, 0.4, 0.3), (0.2, 0.3, 0.4)),
        Threat("l2", 0.5, *BOXES["channels"]),
    ],
    ids=["linf", "l2", "channels", "l2-channels"],
)
def test_a_filled_threat_reads_no_value_and_compiles(threat: Threat, mask: bool) -> None:
    def attack(x: Tensor, g: Tensor, eps: Tensor | None, movable: Tensor | None) -> list[Tensor]:
        filled = threat.filled(eps, movable)
        start = filled.start(x, torch.arange(4, device=x.device), *KEY)
        return [
            filled.step(start, g, x, filled.pgd_alpha),
            filled.project(g, x),
            filled.unboxed().project(g, x),
            filled.at_edge(start, x),
            x + filled.radius(x),
        ]

    x, g = images(SHAPE), gradients(SHAPE)
    for eps in (None, torch.tensor(0.2), torch.linspace(0, 0.3, 4)):
        arguments = (x, g, eps, masks(SHAPE) if mask else None)
        expected = attack(*arguments)
        torch._dynamo.reset()
        compiled = torch.compile(attack, backend="eager", fullgraph=True)
        for found, wanted in zip(compiled(*arguments), expected, strict=True):
            assert torch.equal(found, wanted)
        # Tensors without values: whoever read one would raise.
        empty = [None if t is None else t.to("meta") for t in arguments]
        for found, wanted in zip(attack(*empty), expected, strict=True):
            assert (found.shape, found.dtype) == (wanted.shape, wanted.dtype)
        filled = threat.filled(eps, arguments[3])
        assert filled.nominal == threat.nominal
        assert filled.eps is (threat.eps if eps is None else eps)
        assert (filled.low, filled.high) == (threat.low, threat.high)
        assert (filled.unboxed().low, filled.unboxed().high) == (-math.inf, math.inf)


def test_a_schedule_fills_the_radius_in_place() -> None:
    eps = torch.tensor(0.0)
    threat, x = Threat("linf", 0.1).filled(eps), images(SHAPE)
    assert torch.equal(threat.project(x + 1, x), x)
    eps.fill_(0.25)
    assert torch.equal(threat.project(x - 1, x), Threat("linf", 0.25).project(x - 1, x))


@pytest.mark.parametrize("box", BOXES)
@pytest.mark.parametrize("radius", RADII)
def test_a_stored_start_is_in_the_threat(radius: str, box: str) -> None:
    eps, of = RADII[radius]
    low, high = BOXES[box]
    threat = Threat("linf", eps, low, high)
    x, values = threat.clip(images(SHAPE)), gradients((6, 3, 5, 7))
    rows, scale = torch.tensor([5, 0, 2, 3]), torch.tensor(0.2, dtype=torch.float64)
    start, window = SampleStore(values, 0).start_from(rows, None, x, scale, threat)
    radii = [[of(b, c) for c in range(3)] for b in range(4)]
    ends = [[low if low == 0.0 else low[c], high if high == 1.0 else high[c]] for c in range(3)]
    expected = by_hand(threat, x, x + 0.2 * values[rows], radii, ends)
    torch.testing.assert_close(start, expected, rtol=0, atol=1e-15)
    assert torch.equal(window, values[rows])


def test_numbers_of_a_threat() -> None:
    assert Threat("linf", 0.4).scaled(2.0).nominal == 0.8
    assert Threat("linf", 0.4).unbounded().radius(images(SHAPE)) == math.inf
    rows = torch.tensor([0.1, 0.3, 0.2])
    assert Threat("linf", 0.4).nominal == 0.4
    assert Threat("linf", "8/255").eps == 8 / 255
    assert Threat("linf", [0.1, "1/5", 0.3]).eps == (0.1, 0.2, 0.3)
    assert Threat("linf", (0.1, 0.3, 0.2)).nominal == 0.3
    assert Threat("l2", rows).nominal == pytest.approx(0.3)
    assert Threat("linf", 0.1).filled(rows).nominal == 0.1
    assert dataclasses.replace(Threat("linf", 0.1).filled(rows), low=-1.0).nominal == 0.1
    assert dataclasses.replace(Threat("linf", 0.1), eps=0.2).nominal == 0.2
    assert Threat("linf", 0.2).pgd_alpha == 0.05
    assert Threat("linf", (0.4, 0.2)).pgd_alpha == (0.1, 0.05)
    assert torch.equal(Threat("l2", rows).pgd_alpha, rows * (15 / 128))
    assert Threat("l2", rows).radius(images((3, 1, 2, 2))).shape == (3, 1, 1, 1)
    assert Threat("linf", (0.1, 0.2)).radius(images((5, 2, 3, 4))).shape == (1, 2, 1, 1)
    assert Threat("linf", 0.1).radius(images(SHAPE)) == 0.1


def test_equality_of_tensors_is_identity() -> None:
    eps, mask = torch.tensor([0.1, 0.2]), torch.ones(2, 1, 3, 3, dtype=torch.bool)
    threat = Threat("linf", eps, mask=mask)
    assert threat == Threat("linf", eps, mask=mask)
    assert hash(threat) == hash(Threat("linf", eps, mask=mask))
    assert threat != Threat("linf", eps.clone(), mask=mask)
    assert threat != Threat("linf", 0.1, mask=mask)
    assert Threat("linf", 0.1) == Threat("linf", 0.1)
    assert Threat("linf", 0.1) != Threat("linf", 0.1, targeted=True)
    assert Threat("linf", 0.1) != 0.1
    channels = Threat.normalized((0.5, 0.4), (0.2, 0.3))
    assert pickle.loads(pickle.dumps(channels)) == channels


REFUSED: dict[str, tuple[Callable[[], object], str]] = {
    "negative": (lambda: Threat("linf", (0.1, -0.1)), "eps must be at least 0"),
    "none": (lambda: Threat("linf", ()), "eps has no values"),
    "range": (lambda: Threat("linf", (0.1, 8.0), (0, 0), (1, 1)), "eps=8 is more .* 8/255"),
    "own range": (
        lambda: Threat("linf", 0.5, (0, 0), (1, 0.4)),
        r"eps=0.5 is more than the whole range of a pixel, \[0, 0.4\]",
    ),
    "order": (lambda: Threat("l2", 0.5, (0, 1), (1, 1)), "low must be below high"),
    "order of numbers": (lambda: Threat("linf", 0.1, 1, 0), "low must be below high, not 1.* 0"),
    "targeted": (lambda: Threat(targeted="yes"), "targeted is True or False, not 'yes'"),  # type: ignore[arg-type]
    "lengths": (lambda: Threat("linf", (0.1, 0.1), (0, 0, 0)), "different numbers of values"),
    "l2": (lambda: Threat("l2", (0.1, 0.1)), "In L2 eps is one radius"),
    "integers": (lambda: Threat("linf", torch.tensor([1, 2])), "cannot be a tensor"),
    "columns": (lambda: Threat("linf", torch.rand(3, 1, 1, 1)), "cannot be a tensor"),
    "low": (lambda: Threat("linf", 0.1, torch.zeros(3)), "low cannot be a tensor"),
    "mask": (lambda: Threat("linf", 0.1, mask=torch.ones(3, 1, 2, 2)), "mask must be a bool"),
    "std": (lambda: Threat.normalized((0.5,), (0.0,)), "std must be above 0"),
    "as many": (lambda: Threat.normalized((0.5,), (0.1, 0.2)), "one number for each channel"),
    "ellipsoid": (lambda: Threat.normalized((0.5, 0.5), (0.1, 0.2), "l2"), "is an ellipsoid"),
    "step": (lambda: Threat("linf", 0.1).require_step(2.0), "alpha=2 is more than"),
    "steps": (
        lambda: Threat("linf", 0.1, (0, 0), (1, 4)).require_step((3.0, 5.0)),
        r"alpha=5 is more than the whole range of a pixel, \[0, 4\]",
    ),
    "channels": (
        lambda: Threat("linf", (0.1, 0.1)).project(images(SHAPE), images(SHAPE)),
        r"eps has 2 values, one per channel, but the images have the shape \(4, 3, 5, 7\)",
    ),
    "box": (lambda: Threat("l2", 0.1, (0, 0)).clip(images(SHAPE)), "low has 2 values"),
    "fit": (
        lambda: Threat("l2", 0.1, mask=masks((3, 3, 5, 7))).project(images(SHAPE), images(SHAPE)),
        r"A mask of shape \(3, 1, 5, 7\) does not fit images of shape \(4, 3, 5, 7\)",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused_in_one_sentence(name: str) -> None:
    call, sentence = REFUSED[name]
    with pytest.raises(UserError, match=sentence):
        call()


def test_radii_for_other_images_are_refused() -> None:
    x = images(SHAPE)
    for norm in ("linf", "l2"):
        threat = Threat(norm, torch.tensor([0.1, 0.2]))
        with pytest.raises(ValueError, match=r"shape \(2,\) for 4 images"):
            threat.project(x, x)
