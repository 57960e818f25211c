"""The device-resident loaders against a plain loop over samples, and consistent with themselves."""

import pytest
import torch
from torch.nn.functional import pad as pad_images

from fastadv.data import DeviceLoader, MixedLoader, draws, eval_batches
from fastadv.data.image_sizes import SizedByEpoch
from fastadv.data.resized_crop import ResizedCrop
from fastadv.data.rotation import Rotated
from fastadv.data.small_sets import make_synthetic
from fastadv.errors import UserError

DATA = make_synthetic(train=103, test=40, size=12, num_classes=5)
BIG = {"pad": 3, "flip": True, "seed": 5}


def loader(**options):
    options = {"batch_size": 16, **BIG, **options}
    return DeviceLoader(DATA.train_images, DATA.train_labels, **options)


def crops_one_by_one(images, batch, view, pad, mode):
    out = []
    for n, row in enumerate(batch.index.tolist()):
        if mode == "grey":
            padded = pad_images(images[row : row + 1].float(), (pad,) * 4, value=0.5 * 255)[0]
        else:
            padded = pad_images(images[row : row + 1].float(), (pad,) * 4, mode=mode)[0]
        top, left = int(view.top[n]), int(view.left[n])
        window = padded[:, top : top + 12, left : left + 12]
        out.append(window.flip(-1) if view.flip[n] else window)
    return torch.stack(out) / 255


def same(one, other):
    assert len(one) == len(other)
    for a, b in zip(one, other, strict=True):
        pairs = zip((*list(a)[:3], *a.view), (*list(b)[:3], *b.view), strict=True)
        assert all(torch.equal(x, y) for x, y in pairs)


@pytest.mark.parametrize("padding", ["constant", "grey", "reflect"])
def test_images_are_the_reported_crops_of_the_reported_rows(padding):
    for batch in loader(padding=padding, views=2).epoch(2):
        index, image, label, view = batch
        assert image.equal(crops_one_by_one(DATA.train_images, batch, view, 3, padding))
        assert label.equal(DATA.train_labels[index])
        second, second_view = batch.second
        assert second.equal(crops_one_by_one(DATA.train_images, batch, second_view, 3, padding))
        assert not second_view.top.equal(view.top)


def test_an_epoch_visits_each_row_once_and_epochs_differ():
    orders = [torch.cat([b.index for b in loader().epoch(e)]) for e in (0, 1)]
    for order in orders:
        assert order.sort().values.equal(torch.arange(103))
    assert not orders[0].equal(orders[1])
    other = torch.cat([b.index for b in loader(seed=6).epoch(0)])
    assert not orders[0].equal(other)


def test_starting_inside_an_epoch_gives_the_same_batches_bit_for_bit():
    whole = list(loader(views=2).epoch(4))
    for start in (1, len(whole) - 1, len(whole)):
        late = list(loader(views=2).epoch(4, start_batch=start))
        same(late, whole[start:])


def test_last_batch_rule():
    sizes = [len(b.label) for b in loader().epoch(0)]
    assert sizes == [16] * 6 + [7]
    assert len(loader()) == 7
    assert len(loader(drop_last=True)) == 6
    assert [len(b.label) for b in loader(batch_size=17).epoch(0)] == [17] * 6  # one left: dropped
    assert len(loader(batch_size=1)) == 103
    assert [len(b.label) for b in loader(batch_size=500).epoch(0)] == [103]


def test_indices_are_rows_of_the_whole_set():
    rows = torch.arange(50, 103)
    seen = []
    for batch in loader(indices=rows).epoch(1):
        assert batch.label.equal(DATA.train_labels[batch.index])
        seen.append(batch.index)
    assert torch.cat(seen).sort().values.equal(rows)


@pytest.mark.parametrize("world_size", [2, 3, 5])
def test_processes_share_one_order_and_draw_the_same_views(world_size):
    alone = next(iter(loader(batch_size=103).epoch(3)))
    place = {int(row): n for n, row in enumerate(alone.index)}
    ranks = [
        list(loader(batch_size=8, rank=rank, world_size=world_size).epoch(3))
        for rank in range(world_size)
    ]
    assert len({tuple(len(b.index) for b in batches) for batches in ranks}) == 1
    start = 0
    for together in zip(*ranks, strict=True):
        index = torch.cat([batch.index for batch in together])
        assert index.equal(alone.index[start : start + len(index)])
        start += len(index)
        for batch in together:
            there = torch.tensor([place[int(row)] for row in batch.index])
            assert batch.image.equal(alone.image[there])
    assert 103 - start < world_size or len(ranks[0][-1].index) == 8


@pytest.mark.parametrize("world_size", [2, 4])
def test_whole_batches_are_those_of_one_process(world_size):
    """103 images: a last batch of 7, or of 1, 3 or 2, of which some processes take none."""
    for batch_size in (12, 4, 20, 17):
        one = list(loader(batch_size=batch_size * world_size, whole=True).epoch(3))
        plain = list(loader(batch_size=batch_size * world_size).epoch(3))
        ranks = [
            list(
                loader(batch_size=batch_size, rank=rank, world_size=world_size, whole=True).epoch(3)
            )
            for rank in range(world_size)
        ]
        same(one, plain)
        for batch, *parts in zip(one, *ranks, strict=True):
            assert torch.cat([part.index for part in parts]).equal(batch.index)
            assert torch.cat([part.image for part in parts]).equal(batch.image)
            sizes = [len(part.index) for part in parts]
            assert max(sizes) - min(sizes) <= 3


@pytest.mark.parametrize("wrapped", [Rotated, ResizedCrop])
def test_an_empty_part_may_be_augmented(wrapped):
    shared = {"batch_size": 25, "world_size": 4, "whole": True}
    parts = [wrapped(loader(rank=rank, **shared), seed=0, place=0) for rank in (0, 1)]
    sizes = [[len(batch.image) for batch in part.epoch(0)] for part in parts]
    assert sizes == [[25, 0], [25, 2]]  # of 3 images for four processes
    small = list(SizedByEpoch(parts[0], 6).epoch(0))
    assert [tuple(batch.image.shape) for batch in small] == [(25, 3, 6, 6), (0, 3, 6, 6)]


def test_dtype_and_layout():
    plain = next(iter(loader().epoch(0))).image
    half = next(iter(loader(dtype=torch.bfloat16, channels_last=True).epoch(0))).image
    assert half.is_contiguous(memory_format=torch.channels_last)
    assert half.equal(plain.bfloat16())
    assert plain.is_contiguous()
    double = next(iter(loader(dtype=torch.float64).epoch(0)))
    exact = crops_one_by_one(DATA.train_images.double(), double, double.view, 3, "constant")
    assert (double.image - exact).abs().max() < 1e-7


def test_eval_batches_are_the_images_unchanged_and_in_order():
    parts = list(eval_batches(DATA.test_images, DATA.test_labels, 16))
    assert [len(label) for _, label in parts] == [16, 16, 8]
    images = torch.cat([image for image, _ in parts])
    assert images.equal(DATA.test_images.float() / 255)
    assert torch.cat([label for _, label in parts]).equal(DATA.test_labels)
    unmoved = next(iter(loader(pad=0, flip=False, batch_size=103).epoch(0)))
    assert unmoved.image.equal(DATA.train_images[unmoved.index].float() / 255)
    assert not unmoved.view.top.any()
    assert not unmoved.view.flip.any()
    last = list(eval_batches(DATA.test_images, DATA.test_labels, 16, channels_last=True))[-1][0]
    assert last.is_contiguous(memory_format=torch.channels_last)
    assert last.equal(parts[-1][0])


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"batch_size": 0}, "batch size"),
        ({"pad": -1}, "pad"),
        ({"pad": 12, "padding": "reflect"}, "reflect"),
        ({"padding": "edge"}, "'edge'"),
        ({"views": 3}, "views"),
        ({"rank": 2, "world_size": 2}, "Process 2 of 2"),
        ({"batch_size": 200, "drop_last": True}, "smaller batch size"),
        ({"batch_size": 64, "world_size": 80, "indices": torch.arange(90)}, "smaller batch size"),
    ],
)
def test_meaningless_options_are_refused_in_one_sentence(options, says):
    with pytest.raises(UserError, match=says):
        loader(**options)


def mixed(**options):
    options = {"batch_size": 16, **BIG, **options}
    return MixedLoader(
        DATA.train_images, DATA.train_labels, DATA.test_images, DATA.test_labels, **options
    )


def test_mixed_batches_are_half_labelled_in_one_order():
    all_images = torch.cat([DATA.train_images, DATA.test_images])
    all_labels = torch.cat([DATA.train_labels, DATA.test_labels])
    batches = list(mixed().epoch(0))
    assert len(batches) == len(mixed()) == 7  # ceil(103 / 16)
    labelled = torch.cat([batch.index[batch.index < 103] for batch in batches])
    assert len(labelled.unique()) == len(labelled) == 7 * 8
    for batch in batches:
        assert int((batch.index >= 103).sum()) == 8
        assert batch.label.equal(all_labels[batch.index])
        assert batch.image.equal(crops_one_by_one(all_images, batch, batch.view, 3, "constant"))
    first_half = torch.stack([batch.index[:8] >= 103 for batch in batches]).double().mean()
    assert 0.2 < float(first_half) < 0.8  # the halves are not one after the other
    drawn = torch.cat([batch.index[batch.index >= 103] for batch in batches])
    assert len(drawn.unique()) < len(drawn)  # with replacement
    assert len(drawn.unique()) > 20


def test_mixed_loader_resumes_and_shards():
    whole = list(mixed(views=2).epoch(3))
    same(list(mixed(views=2).epoch(3, start_batch=4)), whole[4:])
    ranks = [list(mixed(batch_size=8, rank=r, world_size=2).epoch(3)) for r in (0, 1)]
    assert len(ranks[0]) == len(ranks[1]) == 7
    labelled = [b.index[b.index < 103] for batches in ranks for b in batches]
    assert len(torch.cat(labelled).unique()) == sum(len(part) for part in labelled)
    for batch, *parts in zip(whole, *ranks, strict=True):
        assert torch.cat([part.index for part in parts]).equal(batch.index)


def test_mixed_loader_refuses_odd_batches_and_foreign_shapes():
    with pytest.raises(UserError, match="even"):
        mixed(batch_size=7)
    with pytest.raises(UserError, match="labelled images' shape"):
        MixedLoader(
            DATA.train_images,
            DATA.train_labels,
            DATA.test_images[:, :, :8],
            DATA.test_labels,
            batch_size=8,
        )


def test_a_sample_has_a_new_crop_and_flip_in_every_epoch() -> None:
    images = torch.randint(0, 256, (64, 1, 8, 8)).to(torch.uint8)
    loader = DeviceLoader(images, torch.zeros(64).long(), batch_size=64, pad=4, flip=True)
    seen = []
    for epoch in range(2):
        (batch,) = loader.epoch(epoch)
        order = batch.index.argsort()
        seen.append([part[order] for part in batch.view])
    for name, first, second in zip(("top", "left", "flip"), *seen, strict=True):
        assert not torch.equal(first, second), name


def test_views_depend_on_seed_epoch_and_stream() -> None:
    rows = torch.arange(200)
    usual = draws.draw_view(rows, 1, 2, 4, True, draws.VIEW)
    others = [
        draws.draw_view(rows, 9, 2, 4, True, draws.VIEW),
        draws.draw_view(rows, 1, 3, 4, True, draws.VIEW),
        draws.draw_view(rows, 1, 2, 4, True, draws.SECOND_VIEW),
    ]
    for other in others:
        assert 0.05 < (usual.top == other.top).double().mean() < 0.25  # 1/9 by chance
