"""Random choices: SplitMix64's published numbers, and the properties that loaders need."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastadv.data import draws
from fastadv.data.labels import split_rows, stratified_rows

# The first outputs of SplitMix64 seeded with 1234567, as published with the algorithm.
PUBLISHED = [6457827717110365317, 3203168211198807973, 9817491932198370423, 4593380528125082431]


def test_hash_is_splitmix64(monkeypatch):
    monkeypatch.setattr(draws, "_key", lambda *counters: 1234567)
    got = draws.hashed(torch.arange(1, 5), 0).tolist()
    assert got == [number >> 1 for number in PUBLISHED]


def test_draws_are_uniform_and_streams_are_unrelated():
    rows = torch.arange(40_000)
    first = draws.uniform(rows, draws.VIEW, 0, 0)
    for counters in [(draws.SECOND_VIEW, 0, 0), (draws.VIEW, 1, 0), (draws.VIEW, 0, 1)]:
        other = draws.uniform(rows, *counters)
        correlation = torch.corrcoef(torch.stack([first, other]))[0, 1]
        assert abs(float(correlation)) < 0.025  # 5 standard errors
    counts = torch.histc(first, 10, 0, 1)
    assert ((counts - 4000).abs() < 5 * (4000 * 0.9) ** 0.5).all()


def test_views_cover_every_offset_equally_and_flips_are_unrelated_to_them():
    rows = torch.arange(81_000)
    view = draws.draw_view(rows, 3, 7, 4, True, draws.VIEW)
    cells = torch.bincount(view.top * 9 + view.left, minlength=81)
    assert len(cells) == 81
    assert ((cells - 1000).abs() < 6 * 1000**0.5).all()
    flips = torch.bincount(view.top * 9 + view.left, weights=view.flip.double(), minlength=81)
    assert ((flips / cells - 0.5).abs() < 6 * 0.5 / 1000**0.5).all()


def test_view_depends_on_the_row_not_on_its_position():
    rows = torch.arange(100)
    shuffled = draws.shuffled(rows, 9)
    straight = draws.draw_view(rows, 0, 1, 4, True, draws.VIEW)
    mixed = draws.draw_view(shuffled, 0, 1, 4, True, draws.VIEW)
    for one, other in zip(straight, mixed, strict=True):
        assert torch.equal(one[shuffled], other)
    assert shuffled.sort().values.equal(rows)
    assert not shuffled.equal(rows)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 4), min_size=2, max_size=80), st.floats(0, 1), st.integers(0, 9))
def test_stratified_rows_keep_each_class_within_one_of_its_share(classes, share, seed):
    labels = torch.tensor(classes)
    count = round(share * len(labels))
    rows = stratified_rows(labels, count, draws.SPLIT, seed)
    assert len(rows) == count
    assert rows.unique().equal(rows)
    for number in labels.unique():
        exact = float((labels == number).sum()) * count / len(labels)
        assert abs(int((labels[rows] == number).sum()) - exact) < 1


def test_split_is_a_partition_that_changes_with_the_seed():
    labels = torch.arange(1437) % 10
    train, held_out = split_rows(labels, 0.1, draws.SPLIT, 0)
    assert torch.cat([train, held_out]).sort().values.equal(torch.arange(1437))
    assert len(held_out) == 144
    assert not held_out.equal(split_rows(labels, 0.1, draws.SPLIT, 1)[1])
