"""Whether a network takes images of every size that a run trains on: asked before it begins."""

from __future__ import annotations

import torch
from torch import nn

from fastadv.by_epoch import Phases
from fastadv.engine.model import guard
from fastadv.engine.model.agreement import draws_kept, host_draws_kept
from fastadv.engine.model.untouched import untouched
from fastadv.errors import UserError


def require_taken(model: nn.Module, sides: int | Phases, channels: int) -> None:
    """Raise ``UserError``, with the network's own words, unless ``model`` forwards images
    (B,channels,side,side) of each of ``sides``. The model and the generators are as before."""
    found = sides.values() if isinstance(sides, Phases) else [sides]
    device = next(model.parameters()).device
    for side in sorted({int(each) for each in found}):
        images = torch.zeros(2, channels, side, side, device=device)
        try:
            with (
                untouched(model), draws_kept(device), host_draws_kept(), torch.no_grad(),
                guard.train_flags(model, False),
            ):  # fmt: skip
                model(images)
        except Exception as error:
            reason = (str(error) or type(error).__name__).strip().splitlines()[0].removesuffix(".")
            raise UserError(
                f"The network cannot take images of {side}x{side} pixels ({reason}): choose other "
                "--image-sizes or another network, or omit them."
            ) from error
