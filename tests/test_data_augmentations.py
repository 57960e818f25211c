"""RandAugment, TrivialAugment, AugMix, MixUp and CutMix equal torchvision's on the same draws."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from every_recipe import step_of
from test_begun_with import SMALL
from test_resume import same
from tiny import tiny_batch
from tiny_staged import staged_model, view_of
from torch import Tensor
from torch.nn import functional

from fastadv.algorithms.recipes.table import methods
from fastadv.data import DeviceLoader, draws
from fastadv.data.augmentations import augmented, canonical, does, names_in
from fastadv.data.mixing import Mixed, neighbours
from fastadv.data.operations import BINS, of_augmix, usual, wide
from fastadv.data.random_operations import AugMixed, RandAugmented, TrivialAugmented, chain_weights
from fastadv.data.small_sets import make_synthetic
from fastadv.engine.torchvision_shim import import_torchvision
from fastadv.errors import Interrupted, UserError
from fastadv.run.console import Console
from fastadv.run.request import RunRequest
from fastadv.run.resolve import resolve_run
from fastadv.run.source import open_source
from fastadv.run.train import resume, train

import_torchvision()
from torchvision.transforms import v2  # noqa: E402

SEED, EPOCH = 7, 3
COUNTERS = (draws.AUGMENT, SEED, EPOCH)
CLASSES = 5


def images(count: int, channels: int = 3, size: tuple[int, int] = (20, 32)) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(0, 256, (count, channels, *size), dtype=torch.uint8, generator=generator)


def row(number: int) -> Tensor:
    return torch.tensor([number])


def drawn(number: int, high: int, *counters: int) -> int:
    return int(draws.integers(row(number), high, *COUNTERS, *counters))


class Told:
    """Torch's generator as told: each of ``integers`` and ``uniforms`` once, in their order."""

    def __init__(
        self, monkeypatch: pytest.MonkeyPatch, integers: list[int], uniforms: list[float]
    ) -> None:
        self.integers, self.uniforms = iter(integers), iter(uniforms)
        monkeypatch.setattr(torch, "randint", lambda *_, **__: torch.tensor(next(self.integers)))
        monkeypatch.setattr(torch, "rand", lambda *_, **__: torch.tensor(next(self.uniforms)))

    def nothing_left(self) -> bool:
        return next(self.integers, None) is None and next(self.uniforms, None) is None


def sign(number: int, *counters: int) -> float:
    """Below 0.5 where the strength is negative."""
    return 0.25 if drawn(number, 2, *counters, 1) else 0.75


@pytest.mark.parametrize("channels", [3, 1])
def test_randaugment_is_torchvisions(channels: int, monkeypatch: pytest.MonkeyPatch) -> None:
    found = RandAugmented(None, seed=SEED).of_stored(  # type: ignore[arg-type]
        images(60, channels), torch.arange(60), *COUNTERS
    )
    space = usual(20, 32)
    theirs = v2.RandAugment()
    assert [op.name for op in space] == list(theirs._AUGMENTATION_SPACE)
    for number, image in enumerate(images(60, channels)):
        chosen = [drawn(number, len(space), place, 0) for place in (0, 1)]
        signs = [sign(number, place) for place in (0, 1) if space[chosen[place]].signed]
        told = Told(monkeypatch, chosen, signs)
        assert torch.equal(found[number], theirs(image)), [space[k].name for k in chosen]
        assert told.nothing_left()
        monkeypatch.undo()


def test_trivialaugment_is_torchvisions(monkeypatch: pytest.MonkeyPatch) -> None:
    found = TrivialAugmented(None, seed=SEED).of_stored(  # type: ignore[arg-type]
        images(90), torch.arange(90), *COUNTERS
    )
    space = wide()
    theirs = v2.TrivialAugmentWide()
    assert [op.name for op in space] == list(theirs._AUGMENTATION_SPACE)
    for number, image in enumerate(images(90)):
        chosen = drawn(number, len(space), 0, 0)
        strong = space[chosen].strengths is not None
        integers = [chosen, *([drawn(number, BINS, 0, 2)] if strong else [])]
        told = Told(monkeypatch, integers, [sign(number, 0)] if space[chosen].signed else [])
        assert torch.equal(found[number], theirs(image)), space[chosen].name
        assert told.nothing_left()
        monkeypatch.undo()


def test_augmix_is_torchvisions(monkeypatch: pytest.MonkeyPatch) -> None:
    found = AugMixed(None, seed=SEED).of_stored(  # type: ignore[arg-type]
        images(30), torch.arange(30), *COUNTERS
    )
    space = of_augmix(20, 32)
    theirs = v2.AugMix()
    assert [op.name for op in space] == list(theirs._AUGMENTATION_SPACE)
    weights = chain_weights(torch.arange(30), *COUNTERS)
    for number, image in enumerate(images(30)):
        integers, signs = [], []
        for chain in range(3):
            depth = 1 + drawn(number, 3, chain, 3)
            integers.append(depth)
            for step in range(depth):
                op = space[chosen := drawn(number, len(space), chain, step, 0)]
                integers += [chosen] + [drawn(number, 3, chain, step, 2)] * (
                    op.strengths is not None
                )
                signs += [sign(number, chain, step)] * op.signed
        told = Told(monkeypatch, integers, signs)
        share = weights[number, 1:].sum()
        dirichlet = iter([torch.stack([1 - share, share])[None], weights[number, 1:][None] / share])
        monkeypatch.setattr(theirs, "_sample_dirichlet", lambda _, given=dirichlet: next(given))
        apart = (found[number].int() - theirs(image).int()).abs()
        assert apart.max() <= 1  # the weights are multiplied in another order
        assert (apart > 0).float().mean() < 0.01
        assert told.nothing_left()
        monkeypatch.undo()


def test_the_weights_of_chains_are_uniform_on_the_simplex() -> None:
    weights = chain_weights(torch.arange(20_000), *COUNTERS).double()
    torch.testing.assert_close(weights.sum(1), torch.ones(20_000, dtype=torch.float64))
    assert weights.min() >= 0
    assert weights.mean(0).tolist() == pytest.approx([1 / 2] + [1 / 6] * 3, abs=0.005)
    # Beta(1,1), and a flat Dirichlet distribution of three.
    assert float(weights[:, 0].var()) == pytest.approx(1 / 12, abs=0.002)
    chains = weights[:, 1:] / weights[:, 1:].sum(1, keepdim=True)
    assert chains.var(0).tolist() == pytest.approx([2 / 36] * 3, abs=0.002)


# -- mixed images ---------------------------------------------------------------------------------


def loader(**options: Any) -> DeviceLoader:
    data = make_synthetic(train=70, test=5, size=16, num_classes=CLASSES)
    options = {"batch_size": 32, "seed": SEED, "views": 2, "pad": 2, "flip": True} | options
    return DeviceLoader(data.train_images, data.train_labels, **options)


def weight(number: int) -> float:
    return float(draws.uniform(row(number), draws.MIX, SEED, EPOCH, 1))


def pairs(count: int) -> Iterator[list[int]]:
    yield from ([first, first + 1] for first in range(0, count - 1, 2))


@pytest.mark.parametrize("kind", ["mixup", "cutmix"])
def test_pairs_are_mixed_as_torchvision_mixes_batches_of_two(kind: str) -> None:
    """A batch rolled by one, as there, is a batch of two with its neighbours exchanged."""
    plain, mixed = loader(), Mixed(loader(), (kind,), num_classes=CLASSES, seed=SEED)
    make: Callable[..., Any] = v2.MixUp if kind == "mixup" else v2.CutMix
    theirs = make(num_classes=CLASSES)
    batches = enumerate(zip(plain.epoch(EPOCH), mixed.epoch(EPOCH), strict=True))
    for number, (before, after) in batches:
        share = weight(number)
        params: dict[str, Any] = {"lam": share}
        if kind == "cutmix":
            x, y = (int(draws.integers(row(number), 16, draws.MIX, SEED, EPOCH, k)) for k in (2, 3))
            half = int(0.5 * (1 - share) ** 0.5 * 16)
            left, top, right, bottom = max(x - half, 0), max(y - half, 0), x + half, y + half
            box = left, top, min(right, 16), min(bottom, 16)
            area = (box[2] - box[0]) * (box[3] - box[1])
            params = {"box": box, "lam_adjusted": 1 - area / 256}
        count = len(before.label)
        for pair in pairs(count):
            params |= {"labels": before.label[pair], "batch_size": 2}
            expected = theirs.transform(before.image[pair], params)
            torch.testing.assert_close(after.image[pair], expected.clamp(0, 1))
            assert before.second is not None
            assert after.second is not None
            second = theirs.transform(before.second[0][pair], params)
            torch.testing.assert_close(after.second[0][pair], second.clamp(0, 1))
            part = params["lam"] if kind == "mixup" else params["lam_adjusted"]
            hot = functional.one_hot(before.label[pair], CLASSES).float()
            torch.testing.assert_close(after.label[pair], part * hot + (1 - part) * hot.flip(0))
        assert torch.equal(before.index, after.index)
        assert after.image.is_contiguous() == before.image.is_contiguous()


def test_the_last_image_of_an_odd_batch_stays() -> None:
    assert neighbours(5).tolist() == [1, 0, 3, 2, 4]
    plain = next(loader(batch_size=7).epoch(0))
    mixed = next(Mixed(loader(batch_size=7), ("mixup",), num_classes=CLASSES, seed=1).epoch(0))
    torch.testing.assert_close(mixed.image[6], plain.image[6])
    assert mixed.label[6].argmax() == plain.label[6]
    assert mixed.label[6].max() == 1


def test_each_batch_takes_one_of_several_and_processes_mix_alike() -> None:
    whole = Mixed(loader(), ("mixup", "cutmix"), num_classes=CLASSES, seed=SEED)
    kinds = [int(draws.integers(row(k), 2, draws.MIX, SEED, EPOCH, 0)) for k in range(40)]
    assert 10 < sum(kinds) < 30
    parts = [
        Mixed(
            loader(batch_size=16, rank=rank, world_size=2),
            ("mixup", "cutmix"),
            num_classes=CLASSES,
            seed=SEED,
        )
        for rank in (0, 1)
    ]
    both = zip(*(part.epoch(EPOCH) for part in parts), strict=True)
    for one, halves in list(zip(whole.epoch(EPOCH), both, strict=True))[:2]:
        for name in ("image", "label", "index"):
            expected = torch.cat([getattr(half, name) for half in halves])
            assert torch.equal(getattr(one, name), expected), name


# -- names, and what goes together ----------------------------------------------------------------


def test_names_are_joined_in_their_order() -> None:
    assert names_in("base") == ()
    assert names_in("base + randaugment+cutmix") == ("randaugment", "cutmix")
    assert canonical("base+rotate") == "rotate"
    assert canonical("base") == "base"
    assert (does("base"), does("resized-crop+mixup"), does("cutmix")) == ("", "scales", "mixes")


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("randaug", "did you mean 'randaugment'"),
        ("cutmix+rotate", r"write rotate\+cutmix"),
        ("rotate+resized-crop", r"write resized-crop\+rotate"),
        ("rotate+rotate", "names one twice"),
        ("", "is empty"),
    ],
)
def test_other_texts_are_refused(text: str, sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        resolve_run(RunRequest(method="pgd", augmentation=text))


@pytest.mark.parametrize(
    ("method", "sentence"),
    [
        ("mart", "objective 'mart' takes none: its margin"),
        ("gairat", "counts the steps"),
        ("te", "keeps something for each image, and a mixed one is two"),
        ("rst", "weighs labelled and pseudo-labelled images apart"),
        ("apart", "keeps something for each image"),
        ("atta-1", "keeps something for each image"),
    ],
)
def test_methods_that_cannot_take_mixed_images_say_why(method: str, sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        resolve_run(RunRequest(method=method, augmentation="randaugment+mixup"))


def test_what_two_places_in_a_row_draw_differs() -> None:
    makes: dict[str, Any] = {"seed": SEED, "epochs": 4, "channels": 3, "num_classes": CLASSES}
    batch = next(augmented(loader(), "rotate", **makes).epoch(EPOCH))
    both = next(augmented(loader(), "randaugment+rotate", **makes).epoch(EPOCH))
    alone = next(augmented(loader(), "randaugment", **makes).epoch(EPOCH))
    assert not torch.equal(batch.image, both.image)
    assert not torch.equal(alone.image, both.image)
    later = augmented(loader(), "autoaugment+mixup", **makes)
    assert next(later.epoch(0)).label.dtype == torch.float32


@pytest.mark.slow
def test_every_method_takes_mixed_images_or_says_why() -> None:
    """All that are not refused make an update with soft labels."""
    taken, refused = [], {}
    for method in methods():
        try:
            config = resolve_run(RunRequest(method=method, augmentation="mixup"))
        except UserError as error:
            refused[method] = str(error)
            continue
        step = step_of(method, staged_model())
        x, y, _, _ = tiny_batch(6, seed=1)
        hot = functional.one_hot(y, 4).double()
        more: dict[str, Any] = {"view": view_of(6, 1)}
        if "second_view" in config.plan.needs:
            more["second"] = tiny_batch(6, seed=101)[0]
        metrics = step(x, 0.7 * hot + 0.3 * hot.flip(0), torch.arange(6), **more)
        step.check()
        assert torch.isfinite(metrics["loss"]), method
        taken.append(method)
    assert all("gives an image the labels of two" in each for each in refused.values())
    assert {"pgd", "trades", "fast", "trades-awp"} <= set(taken)
    assert len(taken) > 40


CONFIG: dict[str, Any] = SMALL | {
    "method": "trades", "epochs": 2, "batch_size": 16, "limit": 100, "device": "cpu",
    "augmentation": "randaugment+mixup+cutmix", "pad": 1, "options": {"steps": 1},
}  # fmt: skip


def test_a_run_with_mixed_images_resumes_bit_for_bit(
    tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    train(RunRequest(**CONFIG, out=str(whole)), Console())
    real, calls = Mixed._mixed, []

    def stopping(self: Mixed, *inputs: Any) -> Any:
        calls.append(inputs[2])
        if len(calls) == 9:
            os.kill(os.getpid(), signal.SIGTERM)
        return real(self, *inputs)

    with monkeypatch.context() as patched:
        patched.setattr(Mixed, "_mixed", stopping)
        with pytest.raises(Interrupted):
            train(RunRequest(**CONFIG, out=str(stopped)), Console())
    resume(str(stopped), Console())
    lines = same(whole, stopped)
    assert 0 <= lines[0]["train_accuracy_percent"] <= 100


def test_images_of_two_channels_are_refused_and_mixed_ones_are_not() -> None:
    makes: dict[str, Any] = {"seed": SEED, "epochs": 4, "channels": 2, "num_classes": CLASSES}
    with pytest.raises(UserError, match="randaugment is for grey or RGB images, not 2"):
        augmented(loader(), "randaugment", **makes)
    augmented(loader(), "mixup", **makes)


def test_stored_perturbations_cannot_follow() -> None:
    config = resolve_run(RunRequest(method="fgsm-plus", augmentation="randaugment"))
    with pytest.raises(UserError, match="randaugment turns images, and a perturbation"):
        open_source(config, torch.device("cpu"))
