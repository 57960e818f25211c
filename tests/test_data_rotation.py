"""Random rotations: equal to torchvision's per image, and what the angle depends on."""

import pytest
import torch

from fastadv.data import DeviceLoader, draws
from fastadv.data.rotation import DEGREES, Rotated, rotate
from fastadv.data.small_sets import make_synthetic
from fastadv.engine.torchvision_shim import import_torchvision
from fastadv.errors import UserError
from fastadv.run.request import RunRequest
from fastadv.run.resolve import resolve_run
from fastadv.run.source import open_source

DATA = make_synthetic(train=64, test=10, size=32, num_classes=5)
SEED = 7


@pytest.mark.parametrize("size", [(32, 32), (8, 8), (20, 31)])
def test_a_turned_image_is_torchvisions(size: tuple[int, int]) -> None:
    torch.manual_seed(0)
    images = torch.rand(8, 3, *size)
    degrees = torch.tensor([0.0, 15, -15, 90, -7.3, 3.1, 0.2, -12.5])
    if size[0] != size[1]:
        degrees[3] = 45.0
    found = rotate(images, degrees)
    turned = import_torchvision().transforms.functional.rotate
    expected = torch.stack([turned(x, float(d)) for x, d in zip(images, degrees, strict=True)])
    # A pixel exactly between two others may come from either.
    assert (found != expected).any(1).float().mean() < 0.01
    assert torch.equal(found[0], images[0])
    assert torch.equal(rotate(images, torch.zeros(8)), images)


def loader(rank: int = 0, world_size: int = 1, **options: object) -> Rotated:
    options = {"batch_size": 16 // world_size, "views": 2, "seed": SEED, **options}
    plain = DeviceLoader(
        DATA.train_images, DATA.train_labels, rank=rank, world_size=world_size, **options
    )
    return Rotated(plain, seed=SEED)


def test_the_angle_depends_on_seed_epoch_and_row_alone() -> None:
    plain = {int(row): image for row, image in enumerate(DATA.train_images.float() / 255)}
    for batch in loader().epoch(2):
        for stream, images in (
            (draws.AUGMENT, batch.image),
            (draws.SECOND_AUGMENT, batch.second[0]),
        ):
            angle = (2 * draws.uniform(batch.index, stream, SEED, 2) - 1) * DEGREES
            assert angle.abs().max() <= 15
            whole = torch.stack([plain[int(row)] for row in batch.index])
            assert torch.equal(images, rotate(whole, angle))
    shared = [batch for rank in range(2) for batch in loader(rank, 2).epoch(2)]
    alone = {int(r): x for b in loader().epoch(2) for r, x in zip(b.index, b.image, strict=True)}
    for batch in shared:
        for row, image in zip(batch.index, batch.image, strict=True):
            assert torch.equal(image, alone[int(row)])


def test_type_and_layout_stay() -> None:
    batch = next(iter(loader(dtype=torch.bfloat16, channels_last=True).epoch(0)))
    assert batch.image.dtype is torch.bfloat16
    assert batch.image.is_contiguous(memory_format=torch.channels_last)


def test_cifar100_is_rotated_as_in_the_published_code() -> None:
    for method in ("pgd", "awp", "rwp", "rat-wp"):
        assert resolve_run(RunRequest(method=method, data="cifar100")).augmentation == "rotate"
        assert resolve_run(RunRequest(method=method, data="cifar10")).augmentation == "base"
    for method in ("apart", "te", "trades", "swa"):
        assert resolve_run(RunRequest(method=method, data="cifar100")).augmentation == "base"
    mine = RunRequest(method="pgd", data="cifar100", augmentation="base")
    assert resolve_run(mine).augmentation == "base"
    keeps = RunRequest(
        method="pgd", data="cifar100", options={"adversary": "atta", "start": "stored"}
    )
    assert resolve_run(keeps).augmentation == "base"


def test_methods_with_stored_perturbations_are_refused() -> None:
    config = resolve_run(RunRequest(method="atta-1", augmentation="rotate"))
    with pytest.raises(UserError, match="--augmentation rotate turns images"):
        open_source(config, torch.device("cpu"))
    config = resolve_run(RunRequest(method="pgd", augmentation="rotate"))
    assert isinstance(open_source(config, torch.device("cpu")).loader, Rotated)
