"""The batches of an evaluation: all images, in order, and some for each process."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from fastadv.engine.process import distributed
from fastadv.run.source import EvalBatches


def batches(rows: Tensor, batch_size: int) -> Iterator[tuple[Tensor, Tensor]]:
    for part in rows.split(batch_size):
        yield part, part


@pytest.mark.parametrize(
    ("processes", "images", "sizes"),
    [
        (1, 10, [8, 2]),
        (2, 10, [5, 5]),
        (3, 10, [4, 4, 2]),
        (2, 40, [8, 8, 8, 8, 8]),
        (4, 2, [1, 1]),
    ],
)
def test_every_process_finds_a_batch(
    processes: int, images: int, sizes: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(distributed, "world_size", lambda: processes)
    found = list(EvalBatches(batches, torch.zeros(images), 8))
    assert [len(x) for x, _ in found] == sizes
    assert torch.cat([x for x, _ in found]).tolist() == list(range(images))
