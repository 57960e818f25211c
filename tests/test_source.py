"""Data and methods that cannot be combined."""

import numpy as np
import pytest
import torch

from fastadv.data import MixedLoader
from fastadv.errors import UserError
from fastadv.run.request import RunRequest
from fastadv.run.resolve import resolve_run
from fastadv.run.source import open_source

CPU = torch.device("cpu")


@pytest.fixture
def labelled_more(tmp_path):
    """Thirty pseudo-labelled images like the digits."""
    path = tmp_path / "more.npz"
    images = np.zeros((30, 8, 8, 1), np.uint8)
    np.savez(path, images=images, labels=np.arange(30) % 10)
    return str(path)


def config(path, method, **options):
    sizes = {"batch_size": 8, "epochs": 2, "val_fraction": 0.1, "limit": 100}
    return resolve_run(RunRequest(method=method, unlabelled=path, options=options, **sizes))


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("apart", {}),
        ("atta-1", {}),
        ("te", {}),
        ("rst", {"target": "temporal-ensembling"}),
        ("rst", {"target": "self-adaptive"}),
    ],
)
def test_methods_with_state_per_sample_refuse_images_drawn_twice(method, options, labelled_more):
    with pytest.raises(UserError, match="may hold the same one twice"):
        open_source(config(labelled_more, method, **options), CPU)


@pytest.mark.parametrize(
    ("method", "options"),
    [("rst", {}), ("pgd", {}), ("free", {}), ("apart", {"learned_start": False})],
)
def test_methods_without_state_per_sample_accept_them(method, options, labelled_more):
    source = open_source(config(labelled_more, method, **options), CPU)
    assert isinstance(source.loader, MixedLoader)
    drawn = torch.cat([batch.index for batch in source.loader.epoch(0)])
    assert len(drawn.unique()) < len(drawn), "nothing was drawn twice"
