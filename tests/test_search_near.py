"""Passes near known points: the logits of whole passes, and local networks alone have them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import fastadv
from fastadv.engine.model.compiled_forward import CompiledForward
from fastadv.evaluation.accuracy import verdicts_of
from fastadv.evaluation.attacks.inputs import attack_passes, attacked_network
from fastadv.evaluation.search import near as near_module
from fastadv.evaluation.search.near import Near
from fastadv.evaluation.search.passes import Passes

SIZE = 24


def calibrated(model: nn.Module, channels: int = 3, size: tuple[int, int] = (SIZE, SIZE)) -> Any:
    """``model`` with weights and statistics of BatchNorm that are not the initial ones."""
    generator = torch.Generator().manual_seed(7)
    model.train()
    with torch.no_grad():
        for _ in range(2):
            model(torch.rand(16, channels, *size, generator=generator))
    return model.eval()


def network(name: str, **options: Any) -> nn.Module:
    torch.manual_seed(1)
    return calibrated(fastadv.build_model(name, num_classes=5, **options))


def windows_in(x: Tensor, side: int, seed: int) -> Tensor:
    """``x`` (n,C,H,W) with one window of noise in each image, the first ones at its corners."""
    generator = torch.Generator().manual_seed(seed)
    point, (height, width) = x.clone(), x.shape[2:]
    corners = [(0, 0), (0, width - side), (height - side, 0), (height - side, width - side)]
    for row in range(len(x)):
        top, left = (
            int(torch.randint(n - side + 1, (), generator=generator)) for n in (height, width)
        )
        if row < len(corners):
            top, left = corners[row]
        colour = torch.rand(x.shape[1], 1, 1, generator=generator, dtype=x.dtype)
        point[row, :, top : top + side, left : left + side] = colour
    return point


def followed(passes: Passes, near: Near, x: Tensor, places: list[int]) -> None:
    """Some queries, after each of which some points become the known ones, some images leave, and
    others come: every one of them has the logits of a whole pass."""
    pool = x
    place = torch.tensor(places)
    known = pool[place]
    for number, side in enumerate((1, 3, 2, 5, 1, 2)):
        point = windows_in(known, side, number)
        whole = passes.logits(point)
        torch.testing.assert_close(near.logits(point, known, place), whole, rtol=0, atol=1e-11)
        taken = (place + number) % 3 == 0
        known = torch.where(taken[:, None, None, None], point, known)
        if number == 2:  # two leave, one comes
            fresh = torch.tensor([max(places) + 1])
            place = torch.cat([place[2:], fresh])
            known = torch.cat([known[2:], pool[fresh]])


@pytest.mark.parametrize(
    "name", ["preact_resnet18", "resnet18", "resnet50", "vgg16", "wide_resnet28_10"]
)
def test_logits_are_those_of_whole_passes(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(near_module, "WORTH", 0.001)
    options = {"width": 1, "depth": 10} if name.startswith("wide") else {"width": 4}
    model = network(name, **options).double()
    x = torch.rand(12, 3, SIZE, SIZE, dtype=torch.float64)
    with attack_passes(model, x.device, False) as passes:
        passes.prepare(x)
        near = passes.near(x, 8)
        assert near is not None
        followed(passes, near, x, [4, 0, 2, 7, 5, 1, 3])


def test_images_may_be_wider_than_high(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(near_module, "WORTH", 0.001)
    torch.manual_seed(1)
    model = calibrated(fastadv.build_model("preact_resnet18", width=4), 3, (20, 31)).double()
    x = torch.rand(9, 3, 20, 31, dtype=torch.float64)
    with attack_passes(model, x.device, False) as passes:
        near = passes.near(x, 7)
        assert near is not None
        followed(passes, near, x, [4, 0, 2, 7, 5, 1, 3])


def test_only_the_windows_are_convolved() -> None:
    model = network("preact_resnet18", width=4)
    x = torch.rand(4, 3, 32, 32)
    sizes: list[int] = []
    with attack_passes(model, x.device, False) as passes:
        near = passes.near(x, 4)
        assert near is not None
        point = windows_in(x, 3, 0)
        near.logits(point, x, torch.arange(4))
        hook = model.layer1[0].conv1.register_forward_pre_hook(
            lambda _, given: sizes.append(given[0].shape[2])
        )
        near.logits(point, x, torch.arange(4))
        hook.remove()
    assert sizes == [14]  # 3 pixels, 5 more on every side, up to an even number


class Small(nn.Module):
    """Two convolutions, ``between`` them, and a third one that makes the maps smaller."""

    def __init__(self, between: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 16, 3, padding=1)
        self.second = nn.Conv2d(16, 16, 3, padding=1)
        self.last = nn.Conv2d(16, 8, 3, stride=2)
        self.classify = nn.Linear(8, 5)
        self.between = between

    def forward(self, x: Tensor) -> Tensor:
        h = self.second(self.between(functional.relu(self.first(x))))
        return self.classify(functional.relu(self.last(h)).mean((2, 3)))


def small(between: Callable[[Tensor], Tensor]) -> nn.Module:
    torch.manual_seed(2)
    return Small(between).eval()


def found_near(model: nn.Module) -> Near | None:
    x = torch.rand(4, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(3))
    with attack_passes(model, x.device, False) as passes:
        return passes.near(x, 4)


def test_a_pointwise_network_is_one_with_windows() -> None:
    assert found_near(small(lambda h: h * 1.5)) is not None


BLUR = torch.ones(16, 1, 3, 3) / 9
OTHERS: dict[str, Callable[[Tensor], Tensor]] = {
    "scaled by a mean over all pixels": lambda h: h * h.mean((2, 3), keepdim=True).sigmoid(),
    "shifted by a mean over all pixels": lambda h: h + 0.05 * h.mean((2, 3), keepdim=True),
    "another convolution, by a function": lambda h: functional.conv2d(
        h, BLUR, padding=1, groups=16
    ),
    "normalised over the map": lambda h: functional.instance_norm(h),
    "turned": lambda h: h.transpose(2, 3),
    "moved": lambda h: h.roll(3, 2),
    "a position of its own": lambda h: h + torch.linspace(0, 1, h.shape[2])[:, None],
    "noise": lambda h: h + 0.01 * torch.randn_like(h),
    "the largest pixel around": lambda h: functional.max_pool2d(h, 3, 1, 1),
    "part of the map": lambda h: h[:, :, 1:-1, 1:-1],
    "blurred in small maps alone": lambda h: (
        functional.avg_pool2d(h, 3, 1, 1) if h.shape[2] < SIZE // 2 else h
    ),
}


@pytest.mark.parametrize("what", OTHERS)
def test_other_networks_get_whole_passes(what: str) -> None:
    assert found_near(small(OTHERS[what])) is None


def test_a_largest_pixel_that_large_windows_contain_is_noticed() -> None:
    class Stretched(Small):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x / x.amax((1, 2, 3), keepdim=True))

    torch.manual_seed(2)
    model = Stretched(lambda h: h).eval()
    x = torch.rand(4, 3, 6, 6, generator=torch.Generator().manual_seed(3)) / 2
    x[:, :, 2:4, 2:4] = 1
    x = functional.interpolate(x, size=(32, 32))
    with attack_passes(model, x.device, False) as passes:
        assert passes.near(x, 4) is None


def test_what_enters_a_module_may_be_changed_in_place_later() -> None:
    class InPlace(Small):
        def forward(self, x: Tensor) -> Tensor:
            h = self.first(x)
            other = self.second(h)
            h = h.relu_() + other
            smaller = self.last(h)
            h.zero_()
            return self.classify(smaller.mean((2, 3)))

    torch.manual_seed(2)
    model = InPlace(lambda h: h).eval().double()
    x = torch.rand(9, 3, SIZE, SIZE, dtype=torch.float64)
    with attack_passes(model, x.device, False) as passes:
        near = passes.near(x, 7)
        assert near is not None
        followed(passes, near, x, [4, 0, 2, 7, 5, 1, 3])


def test_a_module_that_is_called_twice_gets_whole_passes() -> None:
    class Twice(Small):
        def forward(self, x: Tensor) -> Tensor:
            h = self.second(self.second(self.first(x)))
            return self.classify(self.last(h).mean((2, 3)))

    torch.manual_seed(2)
    assert found_near(Twice(lambda h: h).eval()) is None


def test_one_activation_may_serve_the_whole_network() -> None:
    class One(Small):
        def __init__(self, between: Callable[[Tensor], Tensor]) -> None:
            super().__init__(between)
            self.relu = nn.ReLU()

        def forward(self, x: Tensor) -> Tensor:
            h = self.relu(self.second(self.relu(self.first(x))))
            return self.classify(self.relu(self.last(h)).mean((2, 3)))

    torch.manual_seed(2)
    assert found_near(One(lambda h: h).eval()) is not None


def test_maps_that_are_too_large_are_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(near_module, "MOST_BYTES", 4 * SIZE * SIZE * (3 + 16 + 16) * 4 - 1)
    assert found_near(small(lambda h: h)) is None


def test_a_failure_leaves_the_model_as_it_was() -> None:
    model = small(lambda h: h)
    x = torch.rand(4, 3, SIZE, SIZE)
    with attack_passes(model, x.device, False) as passes:
        near = passes.near(x, 4)
        assert near is not None
        broken = model.last.register_forward_hook(lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            near.logits(windows_in(x, 1, 0), x, torch.arange(4))
        broken.remove()
        expected = passes.logits(x)
    assert model.first.padding == model.second.padding == (1, 1)
    assert not any(module._forward_pre_hooks for module in model.modules())
    torch.testing.assert_close(model(x), expected)


def test_looking_for_windows_keeps_the_folds() -> None:
    model = network("preact_resnet18", width=4)
    x = torch.rand(4, 3, SIZE, SIZE)
    with Passes(attacked_network(model, x.device, amp=False)) as passes:
        passes.prepare(x)
        folds = len(passes.network.copies.folds)
        assert passes.near(x, 4) is not None
        passes.logits(x)
        assert len(passes.network.copies.folds) == folds > 0


class Turning(Small):
    """Bright images are inverted, which no image is that is looked at beforehand."""

    def forward(self, x: Tensor) -> Tensor:
        bright = x.mean((1, 2, 3), keepdim=True) > 0.9
        return super().forward(torch.where(bright, 1 - x, x))


def test_a_model_that_acts_otherwise_later_gets_whole_passes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(near_module, "LOOK_EVERY", 3)
    torch.manual_seed(2)
    model = Turning(lambda h: h).eval()
    x = torch.rand(4, 3, SIZE, SIZE)
    known = torch.zeros_like(x)
    known[..., : SIZE // 2 + 3] = 1.0  # not bright, and windows on the left are
    point = known.clone()
    point[..., 3, 3] = 0.5
    with attack_passes(model, x.device, False) as passes:
        near = passes.near(x, 4)
        assert near is not None
        whole = passes.logits(point)
        for _ in range(2):
            found = near.logits(point, known, torch.arange(4))
            assert near.works
            assert (found - whole).abs().max() > 1.5e-3
        found = near.logits(point, known, torch.arange(4))
    assert not near.works
    torch.testing.assert_close(found, whole)


def test_a_model_that_fails_in_a_window_gets_whole_passes() -> None:
    model = small(lambda h: h)
    x = torch.rand(4, 3, SIZE, SIZE)
    with attack_passes(model, x.device, False) as passes:
        near = passes.near(x, 4)
        assert near is not None
        model.between = lambda h: h if h.shape[2] == SIZE else 1 / 0
        point = windows_in(x, 1, 0)
        found = near.logits(point, x, torch.arange(4))
        assert not near.works
        torch.testing.assert_close(found, passes.logits(point))


def test_windows_are_computed_as_written_where_other_passes_are_compiled() -> None:
    model = network("preact_resnet18", width=4).double()
    x = torch.rand(20, 3, SIZE, SIZE, dtype=torch.float64)
    compiled = CompiledForward(backend="eager")
    with attack_passes(model, x.device, False, mode="compiled", compiled=compiled) as passes:
        whole = passes.logits(x)
        near = passes.near(x, 20)
        assert near is not None
        followed(passes, near, x, list(range(18)))
        assert compiled.works
        torch.testing.assert_close(passes.logits(x), whole, rtol=0, atol=0)


def test_a_search_in_low_precision_has_whole_passes() -> None:
    x = torch.rand(4, 3, SIZE, SIZE)
    with attack_passes(small(lambda h: h), x.device, False, search_dtype="bf16") as passes:
        assert passes.near(x, 4) is None
        assert passes.near(x, 4, exact=True) is not None


def test_square_finds_the_same_with_and_without(monkeypatch: pytest.MonkeyPatch) -> None:
    model = network("preact_resnet18", width=4).double()
    generator = torch.Generator().manual_seed(5)
    x = torch.rand(9, 3, SIZE, SIZE, dtype=torch.float64, generator=generator)
    with torch.no_grad():
        logits = model(x)
        # Otherwise the network would give all images one class, far from the others.
        model.linear.bias -= logits.mean(0)
        y = (logits - logits.mean(0)).argmax(1)
    used: list[int] = []
    whole = Near.logits

    def counted(self: Near, point: Tensor, known: Tensor, place: Tensor) -> Tensor:
        used.append(len(point))
        return whole(self, point, known, place)

    monkeypatch.setattr(Near, "logits", counted)

    def attacked() -> Any:
        found = verdicts_of(
            model, [(x, y)], ["square-200"], eps=0.01, norm="linf", alpha=None, seed=0
        )
        return found.ledgers["square-200"]

    found = attacked()
    assert used
    monkeypatch.setattr(Passes, "near", lambda *given, **settings: None)
    used.clear()
    other = attacked()
    assert not used
    assert found.right.tolist() == other.right.tolist()
    assert 0 < found.right.sum() < len(x)
    np.testing.assert_allclose(found.rows["margin"], other.rows["margin"], rtol=0, atol=1e-11)
