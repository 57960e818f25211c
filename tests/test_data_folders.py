"""Folders of images: layouts, the packed cache, and damage of all kinds."""

import errno
import os

import numpy as np
import pytest
from PIL import Image

from fastadv.data import list_images, load, packed
from fastadv.errors import UserError

RNG = np.random.default_rng(0)


def write(path, size=(8, 10), mode="RGB", seed=None):
    path.parent.mkdir(parents=True, exist_ok=True)
    shape = size if mode == "L" else (*size, 3)
    rng = RNG if seed is None else np.random.default_rng(seed)
    pixels = rng.integers(0, 256, shape, dtype=np.uint8)
    Image.fromarray(pixels, mode).save(path, quality=95)
    return pixels


@pytest.fixture
def tree(tmp_path):
    """Two classes, three training and one test image each, PNG so that pixels come back exactly."""
    pixels = {}
    for part, count in (("train", 3), ("val", 1)):
        for name in ("ant", "bee"):
            for n in range(count):
                pixels[part, name, n] = write(tmp_path / part / name / f"{n}.png")
    return tmp_path, pixels


def test_pixels_and_labels_are_those_of_the_files(tree):
    root, pixels = tree
    data = load(f"folder:{root}")
    expected = [pixels["train", name, n] for name in ("ant", "bee") for n in range(3)]
    assert np.array_equal(data.train_images.numpy(), np.stack(expected).transpose(0, 3, 1, 2))
    assert data.train_labels.tolist() == [0, 0, 0, 1, 1, 1]
    assert data.test_labels.tolist() == [0, 1]
    assert np.array_equal(data.test_images[1].numpy(), pixels["val", "bee", 0].transpose(2, 0, 1))
    assert data.num_classes == 2
    assert data.size == (8, 10)


def test_second_load_decodes_nothing_and_a_changed_file_is_detected(tree, monkeypatch):
    root, _ = tree
    first = load(f"folder:{root}")

    def refuse(*args):
        raise AssertionError("decoded again")

    with monkeypatch.context() as patch:
        patch.setattr(packed, "decode", refuse)
        patch.setattr(packed, "common_format", refuse)
        assert load(f"folder:{root}").train_images.equal(first.train_images)
    changed = write(root / "train" / "ant" / "1.png", seed=99)
    again = load(f"folder:{root}")
    assert np.array_equal(again.train_images[1].numpy(), changed.transpose(2, 0, 1))
    assert again.test_images.equal(first.test_images)


def test_a_truncated_cache_is_rebuilt(tree):
    root, _ = tree
    first = load(f"folder:{root}")
    for file in (root / ".fastadv-cache").iterdir():
        file.write_bytes(file.read_bytes()[:-5])
    assert load(f"folder:{root}").train_images.equal(first.train_images)


def test_cache_is_written_to_the_given_folder(tree, tmp_path_factory):
    root, _ = tree
    cache = tmp_path_factory.mktemp("cache")
    load(f"folder:{root}", root=cache)
    assert not (root / ".fastadv-cache").exists()
    assert len(list(cache.iterdir())) == 4  # which are broken, the size, training and test images


def test_a_full_disk_is_one_sentence_and_leaves_nothing(tree, monkeypatch):
    root, _ = tree

    def full(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UserError, match="no space is left"):
        load(f"folder:{root}")
    assert list((root / ".fastadv-cache").iterdir()) == []


def test_other_sizes_are_cropped_to_the_common_one_with_a_warning(tree, capsys):
    root, pixels = tree
    big = np.zeros((16, 40, 3), np.uint8)
    big[:, 10:30] = 200  # twice the common height; the middle 20 columns are what remains
    Image.fromarray(big).save(root / "train" / "ant" / "9.png")
    data = load(f"folder:{root}")
    assert data.size == (8, 10)
    # Antialiasing mixes a little of what was cut off into the outermost columns.
    assert (data.train_images[3, :, :, 1:-1] == 200).all()
    assert (data.train_images[3] > 170).all()
    assert np.array_equal(
        data.train_images[0].numpy(), pixels["train", "ant", 0].transpose(2, 0, 1)
    )
    assert "1 of 7 training images are not 8x10" in capsys.readouterr().err
    assert load(f"folder:{root}", image_size=6).size == (6, 6)


def test_grey_images_have_one_channel_unless_one_is_coloured(tmp_path):
    grey = write(tmp_path / "train" / "a" / "0.png", mode="L")
    write(tmp_path / "test" / "a" / "0.png", mode="L")
    data = load(f"folder:{tmp_path}")
    assert data.channels == 1
    assert np.array_equal(data.train_images[0, 0].numpy(), grey)
    write(tmp_path / "train" / "a" / "1.png")
    mixed = load(f"folder:{tmp_path}")
    assert mixed.channels == 3
    assert (mixed.train_images[0].numpy() == grey).all()
    assert mixed.test_images.shape[1] == 3


@pytest.mark.parametrize("content", [b"", b"not an image", None])
def test_an_unreadable_image_is_named(tree, content):
    root, _ = tree
    bad = root / "train" / "bee" / "1.jpg"
    if content is None:  # cut off in the middle: the header is fine
        write(bad, size=(64, 64))
        content = bad.read_bytes()[:-2000]
    bad.write_bytes(content)
    with pytest.raises(UserError, match=r"bee/1\.jpg \((empty|is not a readable|cut off)"):
        load(f"folder:{root}")
    assert not list((root / ".fastadv-cache").glob("*.part"))


def test_sixteen_bit_images_are_refused_not_clipped(tree):
    root, _ = tree
    deep = RNG.integers(0, 65536, (8, 10)).astype(np.uint16)
    Image.fromarray(deep).save(root / "train" / "ant" / "1.png")
    with pytest.raises(UserError, match=r"ant/1\.png \(has pixel format"):
        load(f"folder:{root}")


def test_images_that_do_not_fit_in_memory_are_refused_with_streaming_as_the_way_out(
    tree, monkeypatch
):
    root, _ = tree
    monkeypatch.setattr(packed, "_memory", lambda: 1000)
    with pytest.raises(UserError, match="--loader dali"):
        load(f"folder:{root}")


def test_broken_layouts_are_refused(tmp_path):
    with pytest.raises(UserError, match="train/ is missing"):
        load(f"folder:{tmp_path}")
    (tmp_path / "train").mkdir()
    with pytest.raises(UserError, match="test/ or val/ is missing"):
        load(f"folder:{tmp_path}")
    (tmp_path / "test").mkdir()
    with pytest.raises(UserError, match="train is empty"):
        load(f"folder:{tmp_path}")
    write(tmp_path / "train" / "a" / "0.png")
    (tmp_path / "test" / "a").mkdir()
    with pytest.raises(UserError, match="a holds no JPEG or PNG image"):
        load(f"folder:{tmp_path}")
    write(tmp_path / "test" / "a" / "0.png")
    write(tmp_path / "test" / "b" / "0.png")
    with pytest.raises(UserError, match="class folder 'b'"):
        load(f"folder:{tmp_path}")


def test_tiny_imagenet_official_layout(tmp_path):
    for name in ("n02", "n01"):
        for n in range(2):
            write(tmp_path / "train" / name / "images" / f"{name}_{n}.JPEG")
    lines = []
    for n, name in enumerate(("n02", "n01", "n02")):
        write(tmp_path / "val" / "images" / f"val_{n}.JPEG")
        lines.append(f"val_{n}.JPEG\t{name}\t0\t0\t5\t5\n")
    (tmp_path / "val" / "val_annotations.txt").write_text("".join(lines))
    data = load(f"tinyimagenet:{tmp_path}")
    assert data.train_labels.tolist() == [0, 0, 1, 1]
    assert data.test_labels.tolist() == [1, 0, 1]
    (tmp_path / "val" / "images" / "val_1.JPEG").unlink()
    with pytest.raises(UserError, match=r"val_1\.JPEG is missing"):
        load(f"tinyimagenet:{tmp_path}")
    (tmp_path / "val" / "val_annotations.txt").write_text("val_0.JPEG\tn99\t0\t0\t5\t5\n")
    with pytest.raises(UserError, match="no training folder"):
        load(f"tinyimagenet:{tmp_path}")
    (tmp_path / "val" / "val_annotations.txt").unlink()
    with pytest.raises(UserError, match="folder:PATH"):
        load(f"tinyimagenet:{tmp_path}")


def test_listing_decodes_nothing(tree):
    root, _ = tree
    (root / "train" / "ant" / "0.png").write_bytes(b"not an image")
    listed = list_images(f"imagenet:{root}")
    assert listed.classes == ("ant", "bee")
    assert [os.path.relpath(f, root) for f in listed.test_files] == [
        "val/ant/0.png",
        "val/bee/0.png",
    ]
    assert listed.train_labels == [0, 0, 0, 1, 1, 1]
    with pytest.raises(UserError, match="not a folder of image files"):
        list_images("digits")
