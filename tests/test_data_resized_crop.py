"""Random resized crops: torchvision's rule and its resizing, and what a crop depends on."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from fastadv.data import DaliLoader, DeviceLoader, draws, list_images, load, stream_format
from fastadv.data.image_sizes import SizedByEpoch, scaled
from fastadv.data.resized_crop import Boxes, ResizedCrop, draw_boxes, resized
from fastadv.data.small_sets import make_synthetic
from fastadv.engine.torchvision_shim import import_torchvision
from fastadv.errors import UserError
from fastadv.run.origin import Origin
from fastadv.run.request import RunRequest
from fastadv.run.resolve import resolve_run
from fastadv.run.source import open_source

DATA = make_synthetic(train=64, test=10, size=32, num_classes=5)
SEED = 7


def uniform(row: int, *counters: int) -> float:
    return float(draws.uniform(torch.tensor([row]), *counters)[0])


def box_by_hand(row: int, height: int, width: int, *counters: int) -> tuple[int, int, int, int]:
    """The rule of torchvision's ``RandomResizedCrop.get_params``, one image at a time."""
    for k in range(10):
        area = height * width * (0.08 + 0.92 * uniform(10 * row + k, *counters, 0))
        low, high = math.log(3 / 4), math.log(4 / 3)
        ratio = math.exp(low + (high - low) * uniform(10 * row + k, *counters, 1))
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            top = math.floor(uniform(row, *counters, 2) * (height - h + 1))
            left = math.floor(uniform(row, *counters, 3) * (width - w + 1))
            return top, left, h, w
    h, w = height, width
    if width / height < 3 / 4:
        h = round(width / (3 / 4))
    elif width / height > 4 / 3:
        w = round(height * (4 / 3))
    return (height - h) // 2, (width - w) // 2, h, w


# The long ones are outside of every allowed ratio, so that often no try fits.
@pytest.mark.parametrize("size", [(32, 32), (224, 224), (40, 24), (17, 90), (300, 40), (1, 1)])
def test_a_box_is_by_torchvisions_rule(size: tuple[int, int]) -> None:
    rows = torch.arange(5, 305)
    heights, widths = (torch.full_like(rows, side) for side in size)
    found = torch.stack(draw_boxes(rows, heights, widths, 9, SEED, 3), 1).tolist()
    expected = [box_by_hand(row, *size, 9, SEED, 3) for row in rows.tolist()]
    assert [tuple(box) for box in found] == expected
    for top, left, h, w in expected:
        assert 0 <= top <= size[0] - h
        assert 0 <= left <= size[1] - w


@pytest.mark.parametrize("size", [(224, 224), (60, 200)])
def test_boxes_are_distributed_as_torchvisions(size: tuple[int, int]) -> None:
    """Means and spreads of 4000 boxes, within four standard errors of their difference."""
    count = 4000
    rows = torch.arange(count)
    heights, widths = (torch.full_like(rows, side) for side in size)
    ours = torch.stack(draw_boxes(rows, heights, widths, 9, SEED, 3), 1).double()
    torch.manual_seed(0)
    draw = import_torchvision().transforms.RandomResizedCrop.get_params
    image = torch.zeros(3, *size)
    drawn = [draw(image, [0.08, 1.0], [3 / 4, 4 / 3]) for _ in range(count)]
    theirs = torch.tensor(drawn, dtype=torch.float64)
    for own, other in (
        (ours, theirs),
        ((ours - ours.mean(0)) ** 2, (theirs - theirs.mean(0)) ** 2),
    ):
        error = ((own.var(0) + other.var(0)) / count).sqrt()
        assert ((own.mean(0) - other.mean(0)).abs() <= 4 * error).all()


@pytest.mark.parametrize("size", [(32, 32), (20, 31)])
def test_a_resized_crop_is_torchvisions(size: tuple[int, int]) -> None:
    torch.manual_seed(0)
    images = torch.rand(40, 3, *size, dtype=torch.float64)
    rows = torch.arange(40)
    heights, widths = (torch.full_like(rows, side) for side in size)
    boxes = draw_boxes(rows, heights, widths, 9, SEED, 3)
    boxes = Boxes(
        *(
            torch.cat([part[:-1], part.new_tensor([last])])
            for part, last in zip(boxes, (3, 5, 1, 1), strict=True)
        )
    )
    crop = import_torchvision().transforms.functional.resized_crop
    expected = torch.stack(
        [
            crop(x, *box, list(size))
            for x, box in zip(images, zip(*map(Tensor.tolist, boxes), strict=True), strict=True)
        ]
    )
    torch.testing.assert_close(resized(images, boxes), expected, rtol=1e-9, atol=1e-9)
    whole = Boxes(torch.zeros_like(rows), torch.zeros_like(rows), heights, widths)
    torch.testing.assert_close(resized(images, whole), images, rtol=1e-12, atol=1e-12)


def loader(rank: int = 0, world_size: int = 1, **options: Any) -> ResizedCrop:
    options = {"batch_size": 16 // world_size, "views": 2, "seed": SEED, "flip": True, **options}
    plain = DeviceLoader(
        DATA.train_images, DATA.train_labels, rank=rank, world_size=world_size, **options
    )
    return ResizedCrop(plain, seed=SEED)


def test_the_crop_depends_on_seed_epoch_and_row_alone() -> None:
    alone = {int(r): x for b in loader().epoch(2) for r, x in zip(b.index, b.image, strict=True)}
    for rank in range(2):
        for batch in loader(rank, 2).epoch(2):
            for row, image in zip(batch.index, batch.image, strict=True):
                assert torch.equal(image, alone[int(row)])
    first = next(iter(loader().epoch(3)))
    assert not torch.equal(first.image[0], alone[int(first.index[0])])
    assert not torch.equal(first.image, first.second[0])
    later = [batch.image for batch in loader().epoch(2)]
    resumed = [batch.image for batch in loader().epoch(2, start_batch=2)]
    assert all(torch.equal(*pair) for pair in zip(later[2:], resumed, strict=True))


def test_type_and_layout_stay() -> None:
    batch = next(iter(loader(dtype=torch.bfloat16, channels_last=True).epoch(0)))
    assert batch.image.dtype is torch.bfloat16
    assert batch.image.is_contiguous(memory_format=torch.channels_last)


def test_the_settings_of_a_run() -> None:
    config = resolve_run(RunRequest(method="pgd", data="cifar10", augmentation="resized-crop"))
    assert (config.pad, config.origins["pad"]) == (0, Origin.USER)
    with pytest.raises(UserError, match="omit --pad"):
        resolve_run(RunRequest(method="pgd", augmentation="resized-crop", pad=4))
    for method, augmentation, pad, decay in (
        ("fast-imagenet", "resized-crop", 0, False),
        ("free-4-imagenet", "resized-crop", 0, True),
        ("apart-imagenet", "base", 4, False),
        ("atta-2-imagenet", "base", 4, True),
    ):
        config = resolve_run(RunRequest(method=method, data="imagenet:/anywhere"))
        found = (config.augmentation, config.pad, config.decay_norms)
        assert found == (augmentation, pad, decay), method
        assert config.options.get("pad", pad) == pad
    config = resolve_run(
        RunRequest(method="apart-no-start", data="cifar10", augmentation="resized-crop")
    )
    assert (config.pad, config.options["pad"]) == (0, 0)


def test_methods_with_stored_perturbations_are_refused() -> None:
    config = resolve_run(RunRequest(method="atta-1", augmentation="resized-crop"))
    with pytest.raises(UserError, match="resized-crop scales images, and a perturbation kept"):
        open_source(config, torch.device("cpu"))
    config = resolve_run(RunRequest(method="pgd", augmentation="resized-crop"))
    assert isinstance(open_source(config, torch.device("cpu")).loader, ResizedCrop)


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> str:
    """23 training images of several sizes, smooth, without losses, and 5 test images."""
    folder = tmp_path_factory.mktemp("tree")
    rng = np.random.default_rng(0)
    for part, count in (("train", 23), ("test", 5)):
        for n in range(count):
            place = folder / part / "ab"[n % 2]
            place.mkdir(parents=True, exist_ok=True)
            coarse = Image.fromarray(rng.integers(0, 256, (4, 5, 3), dtype=np.uint8))
            size = (60, 48) if n % 3 else (90, 40)
            coarse.resize(size, Image.BICUBIC).save(place / f"{n:02}.png")
    return f"folder:{folder}"


class TestWithDali:
    """Its crops are of the files. Needs the optional extra ``dali``."""

    @pytest.fixture(autouse=True)
    def _dali(self):
        pytest.importorskip("nvidia.dali")

    def make(self, tree: str, **options: Any) -> DaliLoader:
        listed = list_images(tree)
        options = {"batch_size": 6, "seed": SEED, "flip": True, **options}
        form = stream_format(listed, 16)
        return DaliLoader(
            listed.train_files, listed.train_labels, form, threads=1, resized_crop=True, **options
        )

    def test_a_view_is_the_drawn_crop_of_the_file(self, tree: str) -> None:
        files = list_images(tree).train_files
        for epoch in (0, 1):
            seen = 0
            for batch in self.make(tree, views=2).epoch(epoch):
                views = (
                    (batch.image, batch.view, draws.AUGMENT),
                    (batch.second[0], batch.second[1], draws.SECOND_AUGMENT),
                )
                for images, view, stream in views:
                    for place, row in enumerate(batch.index.tolist()):
                        with Image.open(files[row]) as file:
                            width, height = file.size
                            top, left, h, w = box_by_hand(row, height, width, stream, SEED, epoch)
                            cut = file.crop((left, top, left + w, top + h))
                            expected = cut.resize((16, 16), Image.BILINEAR)
                        pixels = torch.from_numpy(np.array(expected)).permute(2, 0, 1) / 255
                        pixels = pixels.flip(2) if view.flip[place] else pixels
                        assert (images[place] - pixels).abs().max() < 0.02  # rounded differently
                        seen += 1
            assert seen == 2 * 23

    def test_resume_and_shards(self, tree: str) -> None:
        whole = list(self.make(tree).epoch(2))
        for number in (1, 3):
            for one, other in zip(
                whole[number:], self.make(tree).epoch(2, start_batch=number), strict=True
            ):
                assert torch.equal(one.image, other.image)
        alone = {int(r): x for b in whole for r, x in zip(b.index, b.image, strict=True)}
        for rank in (0, 1):
            for batch in self.make(tree, batch_size=3, rank=rank, world_size=2).epoch(2):
                for row, image in zip(batch.index, batch.image, strict=True):
                    assert torch.equal(image, alone[int(row)])

    def test_a_run_streams_it(self, tree: str) -> None:
        config = resolve_run(
            RunRequest(
                method="pgd", data=tree, image_size=16, loader="dali", batch_size=4,
                val_fraction=0.3, augmentation="resized-crop",
            )
        )  # fmt: skip
        source = open_source(config, torch.device("cpu"))
        assert isinstance(source.loader.loader, DaliLoader)
        resident = load(tree, image_size=16)
        batch = next(iter(source.loader.epoch(0)))
        stored = resident.train_images[batch.index].float() / 255
        assert (batch.image - stored).abs().mean() > 0.02

    def test_its_batches_are_scaled_by_epoch(self, tree: str) -> None:
        config = resolve_run(
            RunRequest(
                method="pgd", data=tree, image_size=16, loader="dali", batch_size=4,
                val_fraction=0.3, augmentation="resized-crop", image_sizes="8@0,16@1",
            )
        )  # fmt: skip
        loader = open_source(config, torch.device("cpu")).loader
        assert isinstance(loader, SizedByEpoch)
        for epoch, side in ((0, 8), (1, 16)):
            for batch, whole in zip(loader.epoch(epoch), loader.loader.epoch(epoch), strict=True):
                assert batch.image.shape[1:] == (3, side, side)
                assert torch.equal(batch.image, scaled(whole.image, side))
