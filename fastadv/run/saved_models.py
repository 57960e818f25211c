"""A trained network from a run folder or from one of its checkpoints."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from fastadv.errors import UserError
from fastadv.models import VARIANTS
from fastadv.models.imported import import_model
from fastadv.models.packaged import names_own_code
from fastadv.run.config import RunConfig
from fastadv.run.configured_model import configured_model
from fastadv.run.foreign_network import load_network
from fastadv.run.provenance import require_own, source
from fastadv.run.run_folder import RunFolder
from fastadv.storage import checkpoint
from fastadv.storage.digests import digest
from fastadv.storage.printable import printable


def load_model(
    path: str,
    num_classes: int | None = None,
    in_channels: int | None = None,
    *,
    model: str | None = None,
    **options: Any,
) -> nn.Module:
    """The network of the run in ``path``: a run folder (its best weights) or a .pt file in one,
    such as last.pt or epochs/0010.pt.

    With ``model``, ``path`` is a file of weights from elsewhere: safetensors, or a .pt file of
    ``torch.save``, read without running code. ``model`` and ``options`` are as for
    ``build_model``, but sizes of fastadv's own networks are read from the tensors, and the names
    of other public code are understood. A file of ``fastadv export`` needs no ``model``.

    Images (B,in_channels,H,W) in [0,1] to logits (B,num_classes) in float32; in eval mode, on the
    CPU. Generators stay where they are. ``num_classes`` and ``in_channels`` None: the run's own.
    Raises ``UserError`` when there is no run, or one for other classes or channels.
    """
    if model is not None or options or Path(path).suffix == ".safetensors":
        known = {name: options.pop(name, None) for name in ("mean", "std", "image_size")}
        known |= {"num_classes": num_classes, "in_channels": in_channels}
        return load_network(path, model, known, options).model
    config, saved, weights = read_run(path)
    built_for = saved.get("built_for", {})
    classes, channels = (
        own if asked is None else asked
        for asked, own in (
            (num_classes, built_for.get("num_classes")),
            (in_channels, built_for.get("in_channels")),
        )
    )
    if not isinstance(classes, int) or not isinstance(channels, int):
        raise UserError(
            f"{printable(weights)} does not say for how many classes and channels it was built: "
            "pass num_classes= and in_channels=."
        )
    facts: dict[str, Any] = {
        "num_classes": classes,
        "in_channels": channels,
        # Only their presence matters: the numbers are part of the saved weights.
        "mean": [0.0] * channels,
        "std": [1.0] * channels,
        "image_size": _size(built_for.get("image_size")),
    }
    check_fit(config, facts, saved["model"], weights)
    with torch.random.fork_rng([]):  # initial weights that are overwritten at once
        network = configured_model(config, **facts)
    checkpoint.load_weights(network, saved["model"], weights)
    return network.eval()


def _size(value: object) -> tuple[int, int] | None:
    """The size (H,W) that a checkpoint holds; None if it is none."""
    sides = value if isinstance(value, (tuple, list)) else ()
    return (sides[0], sides[1]) if [type(side) for side in sides] == [int, int] else None


def fingerprint(path: str) -> str:
    """A digest of the network that ``load_model`` gives: what it is built of, and its weights."""
    config, saved, _ = read_run(path)  # refuses code of strangers
    if names_own_code(config.model):
        import_model(config.model)  # found where ``load_model`` will find it
    settings = ("model", "width", "depth", "normalize", *VARIANTS)
    built = {name: getattr(config, name) for name in settings}
    return digest([built, source(config.model), saved["model"]])


def read_run(path: str) -> tuple[RunConfig, dict[str, Any], Path]:
    """Configuration and checkpoint of the run that ``path`` is or lies in, and its file.

    Raises ``UserError`` for a file that is of another run than its folder."""
    given = Path(path)
    if not given.exists():
        raise UserError(f"There is no {printable(given)}: give a run folder or a checkpoint in it.")
    place = given if given.is_dir() else given.parent
    if place.name == RunFolder(place).epochs.name and not RunFolder(place).config.exists():
        place = place.parent  # the weights of an epoch are in a folder of the run's
    folder = RunFolder.open(str(place))
    config = folder.read_config()
    weights = folder.best if given.is_dir() else given
    saved = checkpoint.load(weights)
    if "model" not in saved:
        raise UserError(f"{printable(weights)} holds no network.")
    require_own(saved, config, weights)
    return config, saved, weights


def check_fit(config: RunConfig, facts: dict[str, Any], state: object, path: Path) -> None:
    """Raise ``UserError`` unless ``state`` is of the network ``config`` names.

    Compared without memory for weights: a width in a file can ask for all there is. Networks of
    one's own are built first; their code was trusted before.
    """
    if names_own_code(config.model):
        return
    count = len(state) if isinstance(state, dict) else 0
    if config.depth is not None and config.depth > count:
        raise UserError(
            f"{printable(path)} belongs to another model: {count} tensors, depth {config.depth}."
        )
    with torch.device("meta"):
        network = configured_model(config, **facts)
    checkpoint.check_weights(network, state, path)
