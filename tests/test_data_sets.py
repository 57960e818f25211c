"""Data sets: their content, and the errors of bad input."""

import pickle
from pathlib import Path

import numpy as np
import pytest
import torch

from fastadv.data import load, small_sets, split_validation
from fastadv.data.dataset import Dataset, channel_statistics
from fastadv.data.small_sets import make_synthetic
from fastadv.engine.torchvision_shim import import_torchvision
from fastadv.errors import UserError


def test_digits_are_scikit_learns_digits(monkeypatch):
    from sklearn.datasets import load_digits

    table = small_sets._digits_table()
    monkeypatch.setattr(Path, "exists", lambda self: False)
    assert (table == small_sets._digits_table()).all()
    monkeypatch.undo()
    digits = load("digits")
    assert digits.train_images.shape == (1437, 1, 8, 8)
    assert digits.test_images.shape == (360, 1, 8, 8)
    ours = torch.cat([digits.train_images, digits.test_images]).flatten(1)
    labels = torch.cat([digits.train_labels, digits.test_labels])
    source = load_digits()
    values = torch.from_numpy(np.rint(source.data * 255 / 16)).to(torch.uint8)

    def as_sorted(images, numbers):
        return sorted(zip(map(bytes, images.numpy()), numbers.tolist(), strict=True))

    assert as_sorted(ours, labels) == as_sorted(values, torch.from_numpy(source.target))
    share = torch.bincount(digits.test_labels) / torch.bincount(labels)
    assert ((share - 0.2).abs() < 0.006).all()
    assert (digits.channels, digits.size, digits.num_classes) == (1, (8, 8), 10)


def test_statistics_are_numpys():
    images = torch.randint(0, 256, (7, 3, 5, 4), dtype=torch.uint8)
    images[:, 2] = 9
    mean, std = channel_statistics(images)
    unit = images.numpy() / 255
    np.testing.assert_allclose(mean, unit.mean((0, 2, 3)), rtol=1e-12)
    np.testing.assert_allclose(std[:2], unit.std((0, 2, 3))[:2], rtol=1e-12)
    assert std[2] == 1 / 255


def test_limit_is_balanced_and_the_same_every_time():
    few = load("digits", limit=100)
    assert few.train_images.shape[0] == 100
    assert (torch.bincount(few.train_labels) - 10).abs().max() <= 1
    assert few.train_images.equal(load("digits", limit=100).train_images)
    assert len(few.test_labels) == 360
    assert len(load("digits", limit=10**6).train_labels) == 1437
    with pytest.raises(UserError, match="at least 1"):
        load("digits", limit=0)


def test_synthetic_images_are_separable_by_class():
    data = load("synthetic")
    assert data.train_images.shape == (2048, 3, 32, 32)
    assert data.test_images.shape == (512, 3, 32, 32)
    centres = torch.stack(
        [data.train_images[data.train_labels == c].float().mean(0) for c in range(10)]
    )
    distance = torch.cdist(data.test_images.float().flatten(1), centres.flatten(1))
    assert (distance.argmin(1) == data.test_labels).float().mean() > 0.95
    assert not make_synthetic(seed=1).train_images.equal(data.train_images)


def test_validation_split():
    data = load("digits")
    train, held_out = split_validation(data, 0.1, seed=3)
    assert len(held_out) == 144
    assert torch.cat([train, held_out]).sort().values.equal(torch.arange(1437))
    for fraction in (0, 1, 1.5, -0.1, 0.9999):
        with pytest.raises(UserError, match="validation share"):
            split_validation(data, fraction)


def arrays(**changes):
    rng = np.random.default_rng(0)
    return {
        "x_train": rng.integers(0, 256, (12, 6, 7, 3), dtype=np.uint8),
        "y_train": np.arange(12) % 3,
        "x_test": rng.integers(0, 256, (4, 6, 7, 3), dtype=np.uint8),
        "y_test": np.arange(4) % 3,
        **changes,
    }


def from_npz(tmp_path, **changes):
    kept = {key: value for key, value in arrays(**changes).items() if value is not None}
    np.savez(tmp_path / "a.npz", **kept)
    return load(f"npz:{tmp_path / 'a.npz'}")


def test_npz_layouts_and_floats_mean_the_same_images(tmp_path):
    raw = arrays()
    plain = from_npz(tmp_path)
    assert plain.num_classes == 3
    assert np.array_equal(plain.train_images.numpy(), raw["x_train"].transpose(0, 3, 1, 2))
    assert plain.train_labels.tolist() == raw["y_train"].tolist()
    first = {key: raw[key].transpose(0, 3, 1, 2) for key in ("x_train", "x_test")}
    assert from_npz(tmp_path, **first).test_images.equal(plain.test_images)
    for kind in (np.float32, np.float64):
        floats = {key: (raw[key] / 255).astype(kind) for key in ("x_train", "x_test")}
        assert from_npz(tmp_path, **floats).train_images.equal(plain.train_images)
    grey = {key: raw[key][..., 0] for key in ("x_train", "x_test")}
    assert from_npz(tmp_path, **grey).train_images.equal(plain.train_images[:, :1])
    column = from_npz(tmp_path, y_train=raw["y_train"][:, None].astype(np.uint8))
    assert column.train_labels.equal(plain.train_labels)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"x_train": np.full((12, 6, 7, 3), 1.5)}, r"\[0,1\]"),
        ({"x_train": np.full((12, 6, 7, 3), -0.1)}, r"\[0,1\]"),
        ({"x_train": np.full((12, 6, 7, 3), np.nan)}, r"\[0,1\]"),
        ({"x_train": np.zeros((12, 6, 7, 3), np.int64)}, "uint8"),
        ({"x_train": np.zeros((12, 6), np.uint8)}, "shape"),
        ({"x_train": np.zeros((11, 6, 7, 3), np.uint8)}, "one int64 label per image"),
        ({"x_train": np.zeros((12, 6, 8, 3), np.uint8)}, "one shape"),
        ({"x_test": np.zeros((0, 6, 7, 3), np.uint8), "y_test": np.zeros(0, int)}, "empty"),
        ({"x_train": np.zeros((0, 6, 7, 3), np.uint8), "y_train": np.zeros(0, int)}, "no training"),
        ({"y_train": np.arange(12) % 3 + 1}, "counted from 0"),
        ({"y_train": np.arange(12) % 3 - 1}, "counted from 0"),
        ({"y_test": np.array([0, 1, 2, 3])}, r"0\.\.2"),
        ({"y_train": np.linspace(0, 1, 12)}, "labels are integers"),
        ({"y_test": None}, "lacks y_test"),
        ({"y_train": np.array([None] * 12)}, "not a readable"),
    ],
)
def test_bad_npz_is_one_sentence(tmp_path, changes, says):
    with pytest.raises(UserError, match=says) as caught:
        from_npz(tmp_path, **changes)
    assert "\n" not in str(caught.value)


def test_a_file_that_is_no_npz_is_refused(tmp_path):
    for name, content in (("text.npz", b"hello"), ("zip.npz", b"PK\x03\x04broken"), ("e.npz", b"")):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(UserError, match="not a readable"):
            load(f"npz:{tmp_path / name}")
    np.save(tmp_path / "single.npy", np.zeros(3))
    with pytest.raises(UserError, match="not a readable"):
        load(f"npz:{tmp_path / 'single.npy'}")


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("cifar-10", "did you mean 'cifar10'"),
        ("foldr:/x", "did you mean 'folder'"),
        ("qqq", "known: cifar10"),
        ("digits:/x", "takes no path"),
        ("folder", "folder:PATH"),
        ("npz:", "npz:PATH"),
        ("npz:/no/such.npz", "no file"),
        ("folder:/no/such/folder", "no folder"),
        ("tinyimagenet:/no/such/folder", "no folder"),
        ("imagenet:/no/such/folder", "no folder"),
    ],
)
def test_unknown_and_missing_data_sets(name, says):
    with pytest.raises(UserError, match=says):
        load(name)


@pytest.mark.parametrize("name", ["cifar10", "cifar100", "svhn"])
def test_missing_torchvision_sets_name_the_option(tmp_path, name):
    with pytest.raises(UserError, match=f"{name} is missing or damaged.*--download"):
        load(name, root=tmp_path)


def write_cifar10(folder, images, labels):
    folder = folder / "cifar-10-batches-py"
    folder.mkdir()
    flat = images.reshape(len(images), -1)
    for n in range(5):
        batch = {"data": flat[n : n + 1], "labels": labels[n : n + 1]}
        (folder / f"data_batch_{n + 1}").write_bytes(pickle.dumps(batch))
    (folder / "test_batch").write_bytes(pickle.dumps({"data": flat[5:], "labels": labels[5:]}))
    (folder / "batches.meta").write_bytes(pickle.dumps({"label_names": list("abcdefghij")}))


def test_cifar10_is_read_from_torchvisions_folder(tmp_path, monkeypatch):
    import_torchvision()
    from torchvision.datasets import cifar

    # The real archive cannot be part of a test, so its checksums are replaced.
    monkeypatch.setattr(cifar, "check_integrity", lambda *args: True)
    images = np.random.default_rng(0).integers(0, 256, (8, 3, 32, 32), dtype=np.uint8)
    labels = [3, 1, 4, 1, 5, 9, 2, 6]
    write_cifar10(tmp_path, images, labels)
    data = load("cifar10", root=tmp_path)
    assert np.array_equal(data.train_images.numpy(), images[:5])
    assert np.array_equal(data.test_images.numpy(), images[5:])
    assert data.train_labels.tolist() + data.test_labels.tolist() == labels
    assert data.mean == (0.4914, 0.4822, 0.4465)


def test_svhn_is_read_from_torchvisions_files(tmp_path, monkeypatch):
    import_torchvision()
    from scipy.io import savemat
    from torchvision.datasets import svhn

    monkeypatch.setattr(svhn, "check_integrity", lambda *args: True)
    images = np.random.default_rng(0).integers(0, 256, (6, 3, 32, 32), dtype=np.uint8)
    for part, rows in (("train", slice(0, 4)), ("test", slice(4, 6))):
        content = {"X": images[rows].transpose(2, 3, 1, 0), "y": np.array([[10], [1], [2], [9]])}
        content["y"] = content["y"][: content["X"].shape[-1]]
        savemat(tmp_path / f"{part}_32x32.mat", content)
    data = load("svhn", root=tmp_path)
    assert np.array_equal(data.train_images.numpy(), images[:4])
    assert data.train_labels.tolist() == [0, 1, 2, 9]  # the file calls a zero 10
    assert data.num_classes == 10


def test_a_data_set_built_by_hand_is_checked():
    images = torch.zeros(4, 1, 8, 8, dtype=torch.uint8)
    labels = torch.tensor([0, 1, 2, 1])
    good = Dataset("mine", images, labels, images, labels, 3)
    assert len(good.mean) == 1
    with pytest.raises(UserError, match=r"labels from 0 to 2.*0\.\.1"):
        Dataset("mine", images, labels, images, labels, 2)
    with pytest.raises(UserError, match="uint8"):
        Dataset("mine", images.float(), labels, images, labels, 3)
