"""No image of a folder is dropped silently, and no size or depth is guessed."""

from __future__ import annotations

import os
import pickle
import struct
import zlib
from pathlib import Path
from types import SimpleNamespace

import hostile_data
import numpy as np
import pytest
import torch
from hostile_data import chunk, picture, tree, whole_png
from PIL import Image

from fastadv.data import DaliLoader, choose_loader, list_images, load, stream_format
from fastadv.data import decode as decoding
from fastadv.errors import UserError
from fastadv.run.built_for import BuiltFor
from fastadv.run.pseudo_labels import read_pseudo_labelled, write_pseudo_labels
from fastadv.storage.printable import printable


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))


def pixels(content: bytes, folder: Path) -> np.ndarray:
    """(C,H,W) of an encoded image, by Pillow."""
    file = folder / "reference"
    file.write_bytes(content)
    return np.asarray(Image.open(file).convert("RGB")).transpose(2, 0, 1)


def test_sub_folders_and_every_suffix_of_torchvision(tmp_path, capsys):
    root = tree(tmp_path / "tree")
    expected = [picture("png", seed=n) for n in range(3)]
    ant = root / "train" / "ant"
    for place, kind, seed in (
        ("deep/er/x.PNG", "png", 7),
        ("deep/b.webp", "webp", 8),
        ("z.bmp", "bmp", 9),
        ("z.tif", "tif", 10),
        ("z.ppm", "ppm", 11),
        ("zz.jpeg", "jpg", 12),
    ):
        (ant / place).parent.mkdir(parents=True, exist_ok=True)
        (ant / place).write_bytes(picture(kind, seed=seed))
        expected.append(picture(kind, seed=seed))
    found = list_images(f"folder:{root}")
    mine = [os.path.relpath(file, ant) for file in found.train_files[: len(expected)]]
    names = ["0.png", "1.png", "2.png", "deep/b.webp", "deep/er/x.PNG"]
    assert mine == [*names, "z.bmp", "z.ppm", "z.tif", "zz.jpeg"]
    assert found.train_labels == [0] * 9 + [1] * 3
    assert found.left_out == ""
    data = load(f"folder:{root}")
    order = [0, 1, 2, 4, 3, 5, 7, 6, 8]
    for row, which in enumerate(order):
        assert np.array_equal(data.train_images[row].numpy(), pixels(expected[which], tmp_path))
    assert "left out" not in capsys.readouterr().err


def test_skipped_files_are_counted_in_one_line(tmp_path, capsys):
    root = tree(tmp_path / "tree")
    bee = root / "train" / "bee"
    (bee / "notes.txt").write_text("x")
    (bee / "a.gif").write_bytes(b"GIF89a")
    (bee / "b.GIF").write_bytes(b"GIF89a")
    (bee / ".hidden.png").write_bytes(picture("png"))
    os.mkfifo(bee / "pipe.png")
    (bee / "gone.png").symlink_to("/nowhere.png")
    (bee / "round").symlink_to(".")
    (root / "train" / "lost.png").write_bytes(picture("png"))
    (root / "val").mkdir()
    data = load(f"folder:{root}")
    assert len(data.train_images) == 6
    told = [line for line in capsys.readouterr().err.splitlines() if "left out" in line]
    assert len(told) == 1
    assert told[0].endswith(
        "8 images are read; left out: 3 of another suffix (.gif, .txt), 1 outside the class "
        "folders, 1 hidden, 2 that are not regular files, 1 folders reached twice by links, "
        "1 whole folder val/, since there is a test/."
    )


def test_the_streamed_list_is_the_loaded_one(tmp_path):
    root = tree(tmp_path / "tree")
    (root / "train" / "ant" / "deep").mkdir()
    (root / "train" / "ant" / "deep" / "a.webp").write_bytes(picture("webp"))
    for kind in ("folder", "imagenet"):
        assert len(list_images(f"{kind}:{root}").train_files) == 7
        assert list_images(f"{kind}:{root}").train_files[3].endswith("deep/a.webp")
    # Streamed or held, ImageNet's images are 224 wide.
    assert stream_format(list_images(f"imagenet:{root}")).width == 224
    assert load(f"imagenet:{root}").size == (224, 224)
    assert choose_loader(f"folder:{root}", 1, "cpu") == "device"


def test_dali_decodes_each_suffix_to_the_same_bytes(tmp_path):
    pytest.importorskip("nvidia.dali")
    root = tree(tmp_path / "tree")
    for kind in hostile_data.FORMATS:
        (root / "train" / "bee" / f"{kind}.{kind}").write_bytes(picture(kind, seed=5))
    found, data = list_images(f"folder:{root}"), load(f"folder:{root}")
    form = stream_format(found)
    loader = DaliLoader(found.train_files, found.train_labels, form, batch_size=4, threads=1)
    streamed = torch.cat([image for image, _ in loader.ordered()])
    assert streamed.mul(255).round().to(torch.uint8).equal(data.train_images)
    bomb = root / "train" / "bee" / "y.png"
    bomb.write_bytes(hostile_data.png(12000, 14000))
    loader = DaliLoader([str(bomb)], [0], form, batch_size=1, threads=1)
    with pytest.raises(UserError, match=r"y\.png has 12000x14000 pixels"):
        list(loader.ordered())


def test_sizes_without_a_majority_require_an_image_size(tmp_path, capsys):
    root = tree(tmp_path / "tree")
    for n in range(20):
        (root / "train" / "ant" / f"odd{n}.png").write_bytes(picture("png", (20 + n, 30 + n)))
    with pytest.raises(UserError, match=r"26 images have 21 sizes.*--image-size 2\d"):
        load(f"folder:{root}")
    with pytest.raises(UserError, match="--image-size"):
        stream_format(list_images(f"folder:{root}"))
    assert load(f"folder:{root}", image_size=16).size == (16, 16)
    capsys.readouterr()
    # Test images of another size are also reported.
    again = tree(tmp_path / "again")
    (again / "test" / "ant" / "big.png").write_bytes(picture("png", (30, 30)))
    assert load(f"folder:{again}").size == (8, 10)
    assert "1 of 3 test images are not 8x10" in capsys.readouterr().err
    assert load(f"folder:{again}").size == (8, 10)
    assert "1 of 3 test images are not 8x10" in capsys.readouterr().err  # also from the cache


def test_coloured_test_images_of_a_grey_set_are_reported(tmp_path, capsys):
    for part in ("train", "test"):
        (tmp_path / part / "a").mkdir(parents=True)
        Image.new("L", (4, 4), 90).save(tmp_path / part / "a" / "0.png")
    Image.new("RGB", (4, 4), (9, 9, 9)).save(tmp_path / "test" / "a" / "1.png")
    assert load(f"folder:{tmp_path}").channels == 1
    assert "1 of 2 test images are coloured and become grey" in capsys.readouterr().err


def test_sixteen_bit_colour_is_scaled(tmp_path):
    """Pillow keeps the high byte: within one grey level of v / 257."""
    values = np.array([0, 255, 256, 257, 32768, 65535, 40000, 12345], np.uint16)
    row = b"\0" + np.repeat(values, 3).astype(">u2").tobytes()
    head = struct.pack(">IIBBBBB", 8, 1, 16, 2, 0, 0, 0)
    content = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head)
    content += chunk(b"IDAT", zlib.compress(row)) + chunk(b"IEND", b"")
    for part in ("train", "test"):
        (tmp_path / part / "a").mkdir(parents=True)
        (tmp_path / part / "a" / "0.png").write_bytes(content)
    found = load(f"folder:{tmp_path}").train_images[0, 0, 0].numpy().astype(float)
    assert np.abs(found - values / 257).max() < 1


def test_many_large_images_are_decoded_a_few_at_a_time(tmp_path, monkeypatch):
    """The bytes of images that are being decoded or wait for their reader are bounded."""
    room = decoding._Room(100)
    with room.taken(60), room.taken(40):
        assert room._free == 0
    with room.taken(10**9):  # one alone may take more
        assert room._free == 0
    assert room._free == 100
    monkeypatch.setattr(decoding, "IN_FLIGHT", 1000)
    made: list[int] = []

    def work(item: int) -> int:
        made.append(item)
        return item

    waiting = iter(decoding.in_threads(work, list(range(200)), bytes_each=500))
    for n in range(100):
        assert next(waiting) == n
        assert len(made) <= n + 1 + 2 * 2  # 1000 / 500 ahead, and as many under way
    assert list(waiting) == list(range(100, 200))


@pytest.mark.slow
def test_large_images_of_few_bytes_take_little_memory(tmp_path):
    """140 PNGs of 12000x14000 pixels are refused; 24 of 5000x6000 are read within bounds."""
    root = tree(tmp_path / "tree")
    for n in range(140):
        (root / "train" / "ant" / f"a{n}.png").write_bytes(hostile_data.png(12000, 14000))
    for size in (None, 64):
        with pytest.raises(UserError, match="12000x14000 pixels"):
            load(f"folder:{root}", image_size=size)
    other = tree(tmp_path / "other")
    content = whole_png(5000, 6000)
    for n in range(24):
        (other / "train" / "ant" / f"a{n}.png").write_bytes(content)
    load(f"folder:{tree(tmp_path / 'warm')}")
    before = hostile_data._peak(reset=True)
    assert load(f"folder:{other}", image_size=8).size == (8, 8)
    assert hostile_data._peak() - before < decoding.IN_FLIGHT + 2**26


# -- untrusted files -------------------------------------------------------------------------------


def test_a_cache_that_came_with_a_folder_is_not_used(tmp_path, tmp_path_factory, monkeypatch):
    root = tree(tmp_path / "tree")
    truth = load(f"folder:{root}").train_images
    cache = root / ".fastadv-cache"
    for file in cache.iterdir():
        content = bytearray(file.read_bytes())
        if len(content) > 1000:
            content[-200:] = bytes(200)
            file.write_bytes(content)
    assert load(f"folder:{root}").train_images.equal(truth)
    # Another user, or machine, did not write what lies there.
    stored = {file.name: file.read_bytes() for file in cache.iterdir()}
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("another")))
    times = {name: (cache / name).stat().st_mtime_ns for name in stored}
    assert load(f"folder:{root}").train_images.equal(truth)
    assert all((cache / name).stat().st_mtime_ns > times[name] for name in stored)
    assert {file.name: file.read_bytes() for file in cache.iterdir()} == stored


def test_nothing_is_written_through_a_link(tmp_path, monkeypatch):
    root = tree(tmp_path / "tree")
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "precious").write_text("precious")
    (root / ".fastadv-cache").symlink_to(outside)
    load(f"folder:{root}")
    assert os.listdir(outside) == ["precious"]
    (root / ".fastadv-cache").unlink()
    load(f"folder:{root}")
    for file in list((root / ".fastadv-cache").iterdir()):
        file.unlink()
        file.symlink_to(outside / "precious")
        (file.parent / f"{file.name}.{os.getpid()}.part").symlink_to(outside / "precious")
    load(f"folder:{root}")
    assert (outside / "precious").read_text() == "precious"
    # Pseudo-labels go to where they are sent, not to where a link there points.
    images = np.zeros((3, 6, 6, 3), np.uint8)
    np.savez(tmp_path / "more.npz", images=images)
    (tmp_path / "out.npz").symlink_to(outside / "precious")
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(108, 4))
    own = BuiltFor(4, 3, (6, 6), (0.5,) * 3, (0.5,) * 3)
    found = SimpleNamespace(built_for=own, file=Path("best.pt"), model=lambda: model)
    monkeypatch.setattr("fastadv.run.pseudo_labels.read_saved", lambda _: found)
    with pytest.raises(UserError, match="is not a regular file"):
        write_pseudo_labels("run", str(tmp_path / "more.npz"), str(tmp_path / "out"))
    assert (outside / "precious").read_text() == "precious"
    (tmp_path / "out.npz").unlink()
    write_pseudo_labels("run", str(tmp_path / "more.npz"), str(tmp_path / "out"))
    found, labels = read_pseudo_labelled(str(tmp_path / "out.npz"), 4)
    assert found.shape == (3, 3, 6, 6)
    assert labels.shape == (3,)
    np.savez(tmp_path / "wrong.npz", images=images, labels=np.array([0, 1, 9]))
    with pytest.raises(UserError, match="labels from 0 to 9"):
        read_pseudo_labelled(str(tmp_path / "wrong.npz"), 4)
    np.savez(tmp_path / "wrong.npz", images=images, labels=np.array([0.5, 1, 2]))
    with pytest.raises(UserError, match="whole numbers"):
        read_pseudo_labelled(str(tmp_path / "wrong.npz"), 4)


def test_postscript_called_an_image_runs_no_program(tmp_path, monkeypatch):
    root = tree(tmp_path / "tree")
    (tmp_path / "gs").write_text(f"#!/bin/sh\ntouch {tmp_path}/ran\n")
    (tmp_path / "gs").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    (root / "train" / "ant" / "9.png").write_bytes(
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 8\n%%EndComments\nshowpage\n%%EOF\n"
    )
    with pytest.raises(UserError, match=r"9\.png \(is not a readable"):
        load(f"folder:{root}")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("name", ["cifar10", "cifar100"])
def test_pickles_of_a_data_root_are_read_only_if_they_are_the_published_ones(tmp_path, name):
    """torchvision unpickles CIFAR's batches, but compares their published checksums first."""
    folder = tmp_path / ("cifar-10-batches-py" if name == "cifar10" else "cifar-100-python")
    folder.mkdir()
    names = [f"data_batch_{n}" for n in range(1, 6)] + ["test_batch", "batches.meta"]
    for file in (*names, "train", "test", "meta"):
        (folder / file).write_bytes(pickle.dumps(hostile_data.Payload(tmp_path / "ran")))
    with pytest.raises(UserError, match="missing or damaged"):
        load(name, root=tmp_path)
    assert not (tmp_path / "ran").exists()


def test_names_are_shown_without_their_control_characters():
    assert printable("a\x1b[2Jb\n\u202ec.png") == "a\\x1b[2Jb\\n\\u202ec.png"
    assert printable(Path("/bär/ü.png")) == "/bär/ü.png"
    assert len(printable("x" * 10_000)) < 400
    assert printable(os.fsdecode(b"\xff")) == "\\udcff"


# -- .npz ------------------------------------------------------------------------------------------


def from_npz(folder: Path, **changes: np.ndarray) -> torch.Tensor:
    np.savez_compressed(folder / "a.npz", **{**hostile_data.arrays(), **changes})
    return load(f"npz:{folder / 'a.npz'}").train_images


def test_sixteen_bit_npz_is_scaled_not_wrapped(tmp_path):
    values = np.resize(np.arange(65536, dtype=np.uint16), (261, 6, 7, 6))  # every value
    labels = np.arange(261) % 3
    images = values.reshape(261, 6, 7, 6)[..., :3]
    for array in (images, images.astype(">u2"), np.asfortranarray(images)):
        found = from_npz(tmp_path, x_train=array, y_train=labels).numpy().transpose(0, 2, 3, 1)
        assert np.array_equal(found, np.rint(images / 257.0).astype(np.uint8))
    with pytest.raises(UserError, match="uint16 of at most 255, all but black"):
        from_npz(tmp_path, x_train=hostile_data.arrays()["x_train"].astype(np.uint16))


def test_other_types_of_npz_are_the_same_images_or_refused(tmp_path):
    raw = hostile_data.arrays()["x_train"]
    expected = torch.from_numpy(raw.transpose(0, 3, 1, 2))
    for kind in (np.float16, np.float32, np.float64, ">f4"):
        assert from_npz(tmp_path, x_train=(raw / 255).astype(kind)).equal(expected)
    assert from_npz(tmp_path, x_train=np.asfortranarray(raw)).equal(expected)
    black_white = from_npz(tmp_path, x_train=raw > 127)
    assert black_white.equal((expected > 127).to(torch.uint8) * 255)
    for kind in (np.int8, np.int16, np.int32, np.int64, np.uint32, np.uint64):
        with pytest.raises(UserError, match=r"astype\('uint8'\).*astype\('uint16'\)"):
            from_npz(tmp_path, x_train=raw.astype(kind))
    with pytest.raises(UserError, match="uint8 of at most 1, all but black"):
        from_npz(tmp_path, x_train=(raw > 127).astype(np.uint8))
    for value in (np.nan, np.inf, 1.0001, -0.1):
        wrong = (raw / 255).astype(np.float32)
        wrong[-1, -1, -1, -1] = value
        with pytest.raises(UserError, match=r"\[0,1\]"):
            from_npz(tmp_path, x_train=wrong)


def test_decompression_bombs_are_refused(tmp_path, monkeypatch):
    dark = np.zeros((12, 100, 100, 3), np.uint8)
    dark[0] = 200
    sizes = {"x_train": dark, "x_test": dark[:4]}
    assert from_npz(tmp_path, **sizes).shape == (12, 3, 100, 100)
    monkeypatch.setattr("fastadv.data.npz_file._LARGE", 2**18)
    with pytest.raises(UserError, match="x_train would grow"):
        from_npz(tmp_path, **sizes)
    np.savez(tmp_path / "a.npz", **{**hostile_data.arrays(), **sizes})
    assert len(load(f"npz:{tmp_path / 'a.npz'}").train_images) == 12


def test_blocks_of_rows_make_the_whole_array(tmp_path, monkeypatch):
    monkeypatch.setattr("fastadv.data.npz_file._BLOCK", 200)
    raw = np.random.default_rng(1).random((12, 6, 7, 3))
    expected = torch.from_numpy(np.rint(raw * 255).astype(np.uint8).transpose(0, 3, 1, 2))
    assert from_npz(tmp_path, x_train=raw).equal(expected)
    assert from_npz(tmp_path, x_train=np.asfortranarray(raw)).equal(expected)


@pytest.mark.slow
def test_an_npz_of_floats_takes_no_more_than_twice_its_images(tmp_path):
    rng = np.random.default_rng(0)
    many = rng.random((20_000, 3, 32, 32))  # 491 MB, which become 61
    few = {"x_train": many[:12], "x_test": many[:4]}
    np.savez(tmp_path / "a.npz", **{**hostile_data.arrays(), **few})
    load(f"npz:{tmp_path / 'a.npz'}")
    small = {"x_test": many[:4], "y_train": np.arange(20_000) % 3}
    np.savez(tmp_path / "a.npz", **{**hostile_data.arrays(), "x_train": many, **small})
    size = many.nbytes
    del many
    before = hostile_data._peak(reset=True)
    load(f"npz:{tmp_path / 'a.npz'}")
    assert hostile_data._peak() - before < 2 * size / 8 + 2**27
