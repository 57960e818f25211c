"""Optimizer groups by layer, for a training loop of one's own."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, cast

from torch import nn

from fastadv.algorithms.contract import Layers
from fastadv.algorithms.options import option_types
from fastadv.algorithms.parts import PARTS
from fastadv.declared import NonNegative, coerce
from fastadv.errors import UserError, unknown


def param_groups(
    model: nn.Module,
    layers: str = "rat-lr",
    lr: float = 0.1,
    groups: str | Iterable[str | int] | None = None,
    split: str = "stages",
) -> list[dict[str, Any]]:
    """Parameter groups for ``torch.optim``; they hold every parameter of ``model`` exactly once.

    Use: ``optimizer = torch.optim.SGD(fastadv.param_groups(model, "rat-lr", lr=0.1),
    momentum=0.9)``, then ``fastadv.step(model, optimizer, method="rat-lr")``, which checks the
    groups.

    ``layers`` names a layers part. The part computes the learning rate of each group from ``lr``.
    ``groups`` ("3,4" or [3, 4]; None: the part's default) are the layer groups that the part
    treats apart. In a network whose stages are not known name modules ("layer4", or ["blocks.10",
    "blocks.11"]); the step gets the same as ``layer_groups=``. ``split`` ("stages" or "quarters")
    says how the network is cut into layer groups (``fastadv.models.stages``). Raises ``UserError``
    for an unknown part, a negative ``lr``, a part that takes no groups, and groups that match no
    parameter.
    """
    rate = coerce("lr", lr, NonNegative)
    kinds = PARTS["layers"]
    if layers not in kinds:
        raise unknown("layers", layers, kinds)
    part, types = kinds[layers], option_types(kinds[layers])
    wanted: dict[str, Any] = {} if groups is None else {"layer_groups": groups}
    if "layer_groups" in types:
        wanted["split"] = split
    elif wanted:
        raise UserError(f"layers={layers!r} takes no groups; omit groups=.")
    options = {name: coerce(name, value, types[name]) for name, value in wanted.items()}
    return cast(Layers, part(**options)).optimizer_groups(model, rate)
