"""AutoAugment and cutout equal torchvision's, sample by sample; other values do not change."""

import os
import signal

import pytest
import torch
from test_resume import same

from fastadv.data import AutoAugmented, DeviceLoader, draws
from fastadv.data.autoaugment import auto_augment, cut_out
from fastadv.data.small_sets import make_synthetic
from fastadv.engine.torchvision_shim import import_torchvision
from fastadv.errors import Interrupted, UserError
from fastadv.run.request import RunRequest
from fastadv.run.resolve import resolve_run
from fastadv.run.source import open_source
from fastadv.run.train import resume, train

DATA = make_synthetic(train=150, test=10, size=32, num_classes=5)
SEED = 7


def loaders(**options):
    options = {"batch_size": 32, "pad": 4, "flip": True, "seed": SEED, "views": 2, **options}
    plain = DeviceLoader(DATA.train_images, DATA.train_labels, **options)
    return plain, AutoAugmented(plain, first_epoch=3, seed=SEED)


def one_by_one(images, index, stream, epoch):
    """torchvision's transform with each sample's draws, on each image alone."""
    transforms = import_torchvision().transforms
    transform, out = transforms.AutoAugment(transforms.AutoAugmentPolicy.CIFAR10), []
    for image, row in zip(images, index, strict=True):
        counters = (stream, SEED, epoch)
        drawn = [draws.uniform(row, *counters, place).item() for place in (1, 2)]
        signs = [draws.integers(row, 2, *counters, place).item() for place in (3, 4)]
        pair = draws.integers(row, 25, *counters, 0).item()
        transform.get_params = lambda _, given=(pair, drawn, signs): given
        out.append(transform(image))
    return torch.stack(out)


def test_images_are_torchvisions_with_a_square_cut_out():
    plain, augmented = loaders()
    for before, after in zip(plain.epoch(3), augmented.epoch(3), strict=True):
        for image, result, stream in (
            (before.image, after.image, draws.AUGMENT),
            (before.second[0], after.second[0], draws.SECOND_AUGMENT),
        ):
            stored = (image * 255).round().to(torch.uint8)
            expected = one_by_one(stored, before.index, stream, 3) / 255
            left = result == expected
            assert (left | (result == 0)).all()
            cut = ~left.all(1)
            assert (cut.flatten(1).sum(1) <= 16 * 16).all()
            assert cut.any()


def test_rows_labels_and_views_stay_and_nothing_changes_in_the_first_half():
    plain, augmented = loaders()
    assert len(plain) == len(augmented)
    for epoch in (2, 3):
        for before, after in zip(plain.epoch(epoch), augmented.epoch(epoch), strict=True):
            pairs = [*zip(before.view, after.view, strict=True), (before.label, after.label)]
            pairs += [(before.index, after.index)]
            pairs += zip(before.second[1], after.second[1], strict=True)
            assert all(torch.equal(one, other) for one, other in pairs)
            for one, other in ((before.image, after.image), (before.second[0], after.second[0])):
                assert torch.equal(one, other) == (epoch < 3)


def images_of(loader, epoch):
    return {
        row: (image, second)
        for batch in loader.epoch(epoch)
        for row, image, second in zip(
            batch.index.tolist(), batch.image, batch.second[0], strict=True
        )
    }


def test_a_sample_depends_on_seed_epoch_and_row_alone():
    first, again = (images_of(loaders(batch_size=size)[1], 3) for size in (32, 50))
    later = images_of(loaders()[1], 4)
    for row, views in first.items():
        assert all(torch.equal(one, other) for one, other in zip(views, again[row], strict=True))
        assert not torch.equal(views[0], later[row][0])
        assert not torch.equal(*views)


def test_the_two_views_differ_though_their_crops_are_the_same():
    views = images_of(loaders(pad=0, flip=False)[1], 3).values()
    assert sum(torch.equal(*pair) for pair in views) == 0


def test_every_policy_and_both_directions_occur():
    rows, image = torch.arange(2000), DATA.train_images[:1]
    found = auto_augment(image.expand(2000, -1, -1, -1), rows, 0, SEED, 1)
    kinds = len(found.flatten(1).unique(dim=0))
    print(kinds)
    assert 100 < kinds < 225


@pytest.mark.parametrize("size", [32, 8])
def test_cutout_is_one_square_of_zeros_around_a_random_pixel(size):
    count, side = 1000, size // 2
    found = cut_out(torch.full((count, 3, size, size), 0.5), torch.arange(count), 9, SEED, 2)
    assert set(found.unique().tolist()) == {0.0, 0.5}
    cut = (found == 0).all(1)
    assert torch.equal(cut, (found == 0).any(1))
    rows, columns = cut.any(2), cut.any(1)
    # A rectangle without holes, whole where the border does not cut it.
    assert torch.equal(cut, rows[:, :, None] & columns[:, None, :])
    for band in (rows, columns):
        length = band.sum(1)
        inside = ~(band[:, 0] | band[:, -1])
        assert (length[inside] == side).all()
        assert (length >= side // 2).all()
        assert ((band.int().diff(dim=1) == 1).sum(1) + band[:, 0] == 1).all()
    # Its centre is uniform: half of the rows and columns cut the middle, fewer a corner.
    share = cut.float().mean(0)
    assert share[size // 2, size // 2] == pytest.approx(0.25, abs=0.04)
    assert share[0, 0] == pytest.approx(((side / 2 + 1) / size) ** 2, abs=0.03)


CONFIG = {
    "method": "fgsm-n-consistency", "width": 4, "epochs": 4, "batch_size": 32, "limit": 100,
    "val_fraction": 0.1, "test_limit": 20, "augmentation": "autoaugment", "device": "cpu",
    "mode": "eager", "test_attacks": "clean", "select_attack": "clean",
}  # fmt: skip


def test_a_stopped_run_resumes_bit_for_bit(tmp_path, monkeypatch):
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    train(RunRequest(**CONFIG, out=str(whole)))
    real, calls = AutoAugmented.augment, []

    def stopping(self, *inputs):
        calls.append(inputs[4])
        if len(calls) == 9:
            os.kill(os.getpid(), signal.SIGTERM)
        return real(self, *inputs)

    with monkeypatch.context() as patched:
        patched.setattr(AutoAugmented, "augment", stopping)
        with pytest.raises(Interrupted):
            train(RunRequest(**CONFIG, out=str(stopped)))
    assert min(calls) == 2, "augmented before half of the run"
    assert calls[-1] == 3
    resume(str(stopped))
    same(whole, stopped)


@pytest.mark.parametrize("method", ["atta-1", "apart", "fgsm-plus"])
def test_methods_with_stored_perturbations_are_refused(method):
    config = resolve_run(RunRequest(**{**CONFIG, "method": method}))
    with pytest.raises(UserError, match=f"omit it with {method}"):
        open_source(config, torch.device("cpu"))
