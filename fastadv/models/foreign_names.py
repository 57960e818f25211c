"""Published weights under the names of other code, as the names and sizes of the networks here.

The names are those of the public code of TRADES, AWP, robust_overfitting, fast_adversarial,
RobustBench, pytorch-cifar and torchvision. All these networks compute what the ones here compute;
those that do not, and show it by their names, are in ``_OTHER_NETWORKS``.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, NamedTuple

from torch import Tensor

from fastadv.errors import UserError

State = dict[str, Tensor]

_TABLE: Mapping[str, tuple[tuple[str, str], ...]] = {
    "wide_resnet": (
        (r"block(\d)\.layer\.(\d+)\.convShortcut\.", r"block\1.\2.shortcut.0."),
        (r"block(\d)\.layer\.(\d+)\.", r"block\1.\2."),
        (r"bn1\.", "bn."),
        (r"fc\.", "linear."),
    ),
    "preact_resnet": (),  # the same names everywhere
    "resnet": (
        (r"bn1\.", "bn."),
        (r"(layer\d\.\d+)\.downsample\.", r"\1.shortcut."),  # torchvision
        (r"fc\.", "linear."),
    ),
}
"""Family -> how names begin there and here. A name of ours stays as it is."""

_NOT_USED = {"wide_resnet": r"sub_block1\."}
"""Weights that the published class makes and its forward never uses: TRADES has a second first
block."""

_OTHER_NETWORKS: Mapping[str, tuple[tuple[str, str, str], ...]] = {
    "wide_resnet": (
        ("init_conv.weight", "", "is the Wide ResNet of Gowal et al. 2020, with other activations"),
        ("linear.weight", "linear.bias", "has no bias in its last layer, so it is another network"),
    ),
    "preact_resnet": (
        (
            "layer4.0.bn1.weight",
            "bn.weight",
            "has no BatchNorm before its last layer, so it is another network",
        ),
    ),
}
"""Family -> a name that is there, one that is not ("": any), and what this says of the network."""

_FAMILIES = {
    "wide_resnet28_10": "wide_resnet",
    "wide_resnet32_10": "wide_resnet",
    "wide_resnet34_10": "wide_resnet",
    "preact_resnet18": "preact_resnet",
    "resnet18": "resnet",
    "resnet50": "resnet",
}

_FIRST = ("conv1.weight", "features.0.weight", "base.0.weight")  # which of them a network has
_SCALING = {
    **dict.fromkeys(("mu", "mean", "normalize.mean", "normalizer.mean", "0.mean"), "mean"),
    **dict.fromkeys(("sigma", "std", "normalize.std", "normalizer.std", "0.std"), "std"),
}
"""Buffers with which a network scales its input as (x - mean) / std."""


class Translated(NamedTuple):
    """``state`` under the names here. ``renamed``: some were others."""

    state: State
    renamed: bool


def translated(network: str, state: Mapping[str, Tensor], file: str) -> Translated:
    """``state`` of ``file`` under the names of fastadv's ``network``; names that no row of the
    table knows stay, and so do those of networks without a table.

    Raises ``UserError`` where two tensors get one name, and for networks that compute otherwise.
    """
    family = _FAMILIES.get(network)
    if family is None:
        return Translated(dict(state), False)
    found: State = {}
    for name, tensor in _unwrapped(state).items():
        if re.match(_NOT_USED.get(family, "$"), name):
            continue
        own = _own_name(family, name)
        if own in found:
            raise UserError(f"{file} has two tensors that would be {own!r}; rename one of them.")
        found[own] = _for_channels(tensor) if own.startswith("normalize.") else tensor
    for there, absent, reason in _OTHER_NETWORKS.get(family, ()):
        if there in found and absent not in found:
            raise UserError(f"{file} {reason}: name its own code, --model module:callable.")
    return Translated(found, found.keys() != state.keys())


def _unwrapped(state: Mapping[str, Tensor]) -> State:
    """``state`` with the names of the network itself, where it is one module of another:
    nn.Sequential(normalization, network), or ``model`` or ``net`` of a LightningModule. No network
    of the table has all its names in one module."""
    found = dict(state)
    while True:
        begins = {name.partition(".")[0] for name in found if name not in _SCALING}
        if len(begins) != 1 or begins & found.keys():
            return found
        prefix = f"{begins.pop()}."
        found = {name.removeprefix(prefix): tensor for name, tensor in found.items()}


def _own_name(family: str, name: str) -> str:
    if name in _SCALING:
        return f"normalize.{_SCALING[name]}"
    for pattern, here in _TABLE[family]:
        own, count = re.subn(f"^{pattern}", here, name)
        if count:
            return own
    return name


def _for_channels(values: Tensor) -> Tensor:
    """One value per channel, in whatever shape, as (1,C,1,1)."""
    return values.reshape(1, -1, 1, 1)


def sizes(network: str, state: Mapping[str, Tensor]) -> dict[str, Any]:
    """Options of ``build_model`` that the tensors of a translated ``state`` show: ``num_classes``,
    ``in_channels``, ``width``, ``depth``, ``stem``. What they do not show is left out."""
    last = state.get("linear.weight")
    first = next((state[name] for name in _FIRST if name in state), None)
    if last is None or first is None or last.dim() != 2 or first.dim() != 4:
        return {}
    found: dict[str, Any] = {"num_classes": len(last), "in_channels": first.shape[1]}
    family = _FAMILIES.get(network)
    if family == "wide_resnet":
        blocks = {name.split(".")[1] for name in state if re.match(r"block1\.\d+\.", name)}
        more = 2 if network == "wide_resnet32_10" else 4  # layers that its authors count
        found |= {"width": max(1, last.shape[1] // 64), "depth": 6 * len(blocks) + more}
    elif family is not None:
        found["width"] = len(first)
    if family == "resnet":
        found["stem"] = "imagenet" if first.shape[-1] == 7 else "cifar"
    return found
