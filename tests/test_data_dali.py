"""DALI's stream against the device-resident loader on the same files; on the CPU."""

import sys

import numpy as np
import pytest
import torch
from PIL import Image

from fastadv.data import (
    DaliLoader,
    DeviceLoader,
    choose_loader,
    list_images,
    load,
    stream_format,
    stream_statistics,
)
from fastadv.data import choice as choosing
from fastadv.errors import UserError

OPTIONS = {"batch_size": 6, "pad": 2, "flip": True, "seed": 4}


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """23 training and 5 test JPEGs of 20 x 16 smooth pixels, in two classes."""
    folder = tmp_path_factory.mktemp("tree")
    rng = np.random.default_rng(0)
    for part, count in (("train", 23), ("test", 5)):
        for n in range(count):
            place = folder / part / "ab"[n % 2]
            place.mkdir(parents=True, exist_ok=True)
            coarse = rng.integers(0, 256, (4, 5, 3), dtype=np.uint8)
            Image.fromarray(coarse).resize((20, 16), Image.BICUBIC).save(place / f"{n:02}.jpg")
    return folder


def test_the_choice_depends_on_size_and_kind(root, monkeypatch):
    monkeypatch.setattr(choosing, "device_memory", lambda device: 1000)
    monkeypatch.setattr(choosing, "import_dali", lambda: None)
    assert choose_loader(f"folder:{root}", 250, "cpu") == "device"
    assert choose_loader(f"folder:{root}", 251, "cpu") == "dali"
    assert choose_loader("cifar10", 10**9, "cpu") == "device"


def test_missing_dali_is_one_sentence(root, monkeypatch):
    monkeypatch.setitem(sys.modules, "nvidia.dali", None)
    tree = list_images(f"folder:{root}")
    form = stream_format(tree)
    with pytest.raises(UserError, match="pip install nvidia-dali-cuda130"):
        DaliLoader(tree.train_files, tree.train_labels, form, batch_size=4)
    monkeypatch.setattr(choosing, "device_memory", lambda device: 0)
    with pytest.raises(UserError, match="pip install nvidia-dali-cuda130"):
        choose_loader(f"folder:{root}", 1, "cpu")


def test_format_and_statistics_of_a_tree(root):
    tree = list_images(f"folder:{root}")
    form = stream_format(tree)
    assert (form.height, form.width, form.channels) == (16, 20, 3)
    assert stream_format(tree, 8).height == 8
    data = load(f"folder:{root}")
    assert stream_statistics(tree, form) == (data.mean, data.std)
    whole = list_images(f"imagenet:{root}")
    assert stream_format(whole).width == 224
    assert stream_statistics(whole, form)[0] == (0.485, 0.456, 0.406)


class TestWithDali:
    """Needs the optional extra ``dali``."""

    @pytest.fixture(autouse=True)
    def _dali(self):
        pytest.importorskip("nvidia.dali")

    @pytest.fixture
    def pair(self, root):
        """Both loaders over the same files, given the same options."""
        tree, data = list_images(f"folder:{root}"), load(f"folder:{root}")
        form = stream_format(tree)

        def make(**options):
            options = {**OPTIONS, **options}
            return (
                DaliLoader(tree.train_files, tree.train_labels, form, threads=1, **options),
                DeviceLoader(data.train_images, data.train_labels, **options),
            )

        return make

    @staticmethod
    def same(streamed, resident):
        assert len(streamed) == len(resident)
        for one, other in zip(streamed, resident, strict=True):
            assert one.index.equal(other.index)
            assert one.label.equal(other.label)
            assert one.image.equal(other.image)
            assert all(a.equal(b) for a, b in zip(one.view, other.view, strict=True))
            if one.second is not None:
                assert one.second[0].equal(other.second[0])

    @pytest.mark.parametrize(
        "options",
        [
            {},
            {"views": 2, "padding": "reflect", "channels_last": True, "dtype": torch.bfloat16},
            {"indices": torch.arange(3, 20), "drop_last": True},
        ],
    )
    def test_same_batches_as_from_memory(self, pair, options):
        streamed, resident = pair(**options)
        assert len(streamed) == len(resident)
        for epoch in (0, 1):  # the second epoch is prefetched during the first
            self.same(list(streamed.epoch(epoch)), list(resident.epoch(epoch)))
        first = next(iter(streamed.epoch(5))).image
        if options.get("channels_last"):
            assert first.is_contiguous(memory_format=torch.channels_last)

    def test_resume_at_any_batch_and_after_an_abandoned_epoch(self, pair):
        streamed, resident = pair()
        self.same(list(streamed.epoch(2, start_batch=3)), list(resident.epoch(2, 3)))
        abandoned = streamed.epoch(3)
        next(abandoned)
        self.same(list(streamed.epoch(7, start_batch=1)), list(resident.epoch(7, 1)))
        self.same([next(abandoned)], list(resident.epoch(3))[1:2])

    @pytest.mark.parametrize(
        "options",
        [
            {"batch_size": 5},  # of the last batch
            {"batch_size": 8, "indices": torch.arange(3), "views": 2},  # of the only one
        ],
    )
    def test_a_process_may_have_no_image_of_a_batch(self, pair, options):
        """As with --bn global, where the processes share a batch of all."""
        none = 0
        for rank in range(4):
            streamed, resident = pair(**options, rank=rank, world_size=4, whole=True)
            none += 0 in streamed.shard.sizes
            for epoch in (0, 1):
                self.same(list(streamed.epoch(epoch)), list(resident.epoch(epoch)))
            last = len(streamed) - 1
            self.same(list(streamed.epoch(3, last)), list(resident.epoch(3, last)))
        assert none == 2

    def test_each_process_reads_its_shard(self, pair):
        for rank in (0, 1):
            streamed, resident = pair(batch_size=4, rank=rank, world_size=2)
            self.same(list(streamed.epoch(0)), list(resident.epoch(0)))

    def test_ordered_images_are_the_files(self, root):
        tree, data = list_images(f"folder:{root}"), load(f"folder:{root}")
        streamed = DaliLoader(
            tree.test_files, tree.test_labels, stream_format(tree), batch_size=2, threads=1
        )
        for _ in range(2):
            parts = list(streamed.ordered())
            assert [len(label) for _, label in parts] == [2, 2, 1]
            images = torch.cat([image for image, _ in parts])
            assert images.equal(data.test_images.float() / 255)
            assert torch.cat([label for _, label in parts]).equal(data.test_labels)

    def test_resizing_agrees_with_the_cache_up_to_the_filter(self, root):
        tree, data = list_images(f"folder:{root}"), load(f"folder:{root}", image_size=8)
        form = stream_format(tree, 8)
        streamed = DaliLoader(tree.train_files, tree.train_labels, form, batch_size=23, threads=1)
        images, _ = next(iter(streamed.ordered()))
        assert images.shape == (23, 3, 8, 8)
        assert (images - data.train_images.float() / 255).abs().mean() < 0.01

    def test_an_unreadable_or_missing_image_is_named(self, root, tmp_path):
        tree = list_images(f"folder:{root}")
        broken = tmp_path / "broken.jpg"
        broken.write_bytes(b"not an image")
        for bad, says in ((str(broken), "not a readable"), (str(tmp_path / "x.jpg"), "is missing")):
            files = [*tree.train_files[:5], bad]
            streamed = DaliLoader(
                files, [0] * 6, stream_format(tree), batch_size=3, threads=1, prefetch=1
            )
            with pytest.raises(UserError, match=says):
                list(streamed.ordered())
