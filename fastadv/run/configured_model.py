"""The network that a run's configuration names."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from fastadv.models import VARIANTS, build_model
from fastadv.run.config import RunConfig


def configured_model(
    config: RunConfig,
    *,
    num_classes: int,
    in_channels: int,
    mean: Sequence[float],
    std: Sequence[float],
    image_size: tuple[int, int] | None,
) -> nn.Module:
    """Images (B,in_channels,H,W) in [0,1] to logits (B,num_classes), as ``config`` says.

    ``mean`` and ``std`` are the data's; a network that does not normalise goes without them.
    ``image_size`` is (H,W), for the networks that are built for one size; None: their own.
    """
    options: dict[str, Any] = {
        name: getattr(config, name)
        for name in ("width", "depth", *VARIANTS)
        if getattr(config, name) is not None
    }
    if config.normalize:
        options |= {"mean": list(mean), "std": list(std)}
    return build_model(
        config.model,
        num_classes=num_classes,
        in_channels=in_channels,
        dropout=config.dropout,
        image_size=image_size,
        **options,
    )
