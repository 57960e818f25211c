"""Puts averaged weights into a model for an evaluation, and restores its own afterwards."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import update_bn

from fastadv.engine.model import guard
from fastadv.engine.model.buffers import Layout, copy_into, floating_buffers, kept, places
from fastadv.engine.model.whole_norm import whole_statistics
from fastadv.engine.process import distributed
from fastadv.engine.process.division import Division


@contextmanager
def averaged_weights(
    model: nn.Module,
    average: Mapping[str, Tensor],
    batches: Iterable[Any] | None,
    division: Division | None = None,
) -> Iterator[None]:
    """Within this context the parameters and buffers named in ``average`` have the values in it; an
    empty ``average`` changes nothing.

    With ``batches`` BatchNorm's running statistics are re-estimated for the average by a pass in
    training mode, in which every batch has the same weight. With a ``division`` the processes have
    parts of each batch, and the statistics are those of the whole; without, the mean of those of
    the parts. Weights and buffers are restored on exit.
    """
    if not average:
        yield
        return
    named: dict[str, Tensor] = {**dict(model.named_parameters()), **floating_buffers(model)}
    present = [named[name].detach() for name in average]
    live = [tensor.clone() for tensor in present]
    with kept(Layout(places(model.modules()))):
        copy_into(present, [*average.values()])
        try:
            if batches is not None:
                device = present[0].device
                # Dropout in these passes must not change what it draws in training.
                drawing = torch.random.fork_rng([device] if device.type == "cuda" else [])
                whole = nullcontext() if division is None else whole_statistics(division)
                with guard.flags_kept(model), torch.no_grad(), drawing, whole:
                    update_bn(_images(batches, division), model, device)
                if division is None:
                    distributed.average([b for b in model.buffers() if b.is_floating_point()])
            yield
        finally:
            copy_into(present, live)


def _images(batches: Iterable[Any], division: Division | None) -> Iterator[Tensor]:
    for batch in batches:
        if isinstance(batch, Tensor):
            images = batch
        else:
            images = batch.image if hasattr(batch, "image") else batch[0]
        if division is not None:  # the part of a process may be empty
            images = division.own_rows(*division.put_together([images]))
        yield images
