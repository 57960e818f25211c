"""Options of parts that hold networks: written as paths in a run, loaded before its step."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from fastadv.algorithms.options import all_options
from fastadv.algorithms.plan import Plan
from fastadv.algorithms.resolution import resolve
from fastadv.declared import holds_networks
from fastadv.run.saved_models import fingerprint, load_model


def with_networks(plan: Plan, num_classes: int, in_channels: int) -> Plan:
    """``plan`` with networks in the place of paths; ``plan`` itself where it holds none.

    Raises ``UserError`` where a path is no run, or one for other classes or channels.
    """
    loaded: dict[str, Any] = {
        name: [
            load_model(each, num_classes, in_channels) if isinstance(each, str) else each
            for each in networks
        ]
        for name, networks in _networks(plan).items()
    }
    return resolve(plan.method, {**plan.slots, **plan.options, **loaded}) if loaded else plan


def fingerprints(plan: Plan) -> dict[str, str]:
    """A digest of every network that ``plan`` names by a path: option and number -> digest."""
    return {
        f"{name.removesuffix('s')} {number}": fingerprint(each)
        for name, networks in _networks(plan).items()
        for number, each in enumerate(networks, start=1)
        if isinstance(each, str)
    }


def _networks(plan: Plan) -> dict[str, Sequence[nn.Module | str]]:
    """The options that hold networks and are set, by name."""
    hints = all_options(type(part) for part in plan.parts.values())
    found: dict[str, Sequence[nn.Module | str]] = {}
    for slot in plan.parts.values():
        for name in hints:
            if holds_networks(hints[name]) and getattr(slot, name, None):
                found[name] = getattr(slot, name)
    return found
