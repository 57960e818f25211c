"""A trained network from a run folder or from one of its checkpoints."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fastadv.errors import UserError, brief
from fastadv.models import VARIANTS
from fastadv.models.imported import import_model
from fastadv.models.packaged import names_own_code
from fastadv.run.built_for import BuiltFor
from fastadv.run.config import RunConfig
from fastadv.run.configured_model import configured_model
from fastadv.run.foreign_network import agreed, load_network
from fastadv.run.provenance import require_own, source
from fastadv.run.run_folder import RunFolder
from fastadv.storage import checkpoint
from fastadv.storage.digests import digest
from fastadv.storage.printable import printable
from fastadv.storage.weights_file import PROGRAMS


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
    if not isinstance(path, (str, os.PathLike)):
        raise UserError(
            f"load_model takes the path of a run folder or a file of weights, not {brief(path)}."
        )
    if model is not None or options or Path(path).suffix in (".safetensors", *PROGRAMS):
        known = {name: options.pop(name, None) for name in ("mean", "std", "image_size")}
        known |= {"num_classes": num_classes, "in_channels": in_channels}
        return load_network(path, model, known, options).model
    found = read_saved(path)
    require_as_asked(found, num_classes, in_channels, "the call")
    return found.model()


@dataclass(frozen=True)
class SavedNetwork:
    """The network in the checkpoint ``file`` of a run: its configuration, what it was built for,
    and all that the file holds."""

    config: RunConfig
    built_for: BuiltFor
    saved: Mapping[str, Any]
    file: Path

    @classmethod
    def read(cls, folder: RunFolder, file: Path) -> SavedNetwork:
        """Raises ``UserError`` for a file that is damaged or of another run."""
        config = folder.read_config()
        saved = checkpoint.load(file)
        if "model" not in saved:
            raise UserError(f"{printable(file)} holds no network.")
        require_own(saved, config, file)
        found = cls(config, BuiltFor.read(saved, file), saved, file)
        check_fit(config, found.built_for.facts(), saved["model"], file)
        return found

    def model(self) -> nn.Module:
        """The network with its weights, in eval mode, on the CPU."""
        with torch.random.fork_rng([]):  # initial weights that are overwritten at once
            network = configured_model(self.config, **self.built_for.facts())
        checkpoint.load_weights(network, self.saved["model"], self.file)
        return network.eval()


def require_as_asked(
    found: SavedNetwork, num_classes: int | None, in_channels: int | None, what: str
) -> None:
    """Raise ``UserError`` unless ``found`` is for the classes and channels of ``what``, as far as
    they are given."""
    own, shown = found.built_for, printable(found.file)
    agreed("num_classes", num_classes, own.num_classes, shown, what)
    agreed("in_channels", in_channels, own.in_channels, shown, what)


def fingerprint(path: str) -> str:
    """A digest of the network that ``load_model`` gives: what it is built of, and its weights."""
    found = read_saved(path)  # refuses code of strangers
    config = found.config
    if names_own_code(config.model):
        import_model(config.model)  # found where ``load_model`` will find it
    settings = ("model", "width", "depth", "normalize", *VARIANTS)
    built = {name: getattr(config, name) for name in settings}
    return digest([built, source(config.model), found.saved["model"]])


def read_saved(path: str) -> SavedNetwork:
    """The network of the run that ``path`` is or lies in."""
    given = Path(path)
    if not given.exists():
        raise UserError(f"There is no {printable(given)}: give a run folder or a checkpoint in it.")
    place = given if given.is_dir() else given.parent
    if place.name == RunFolder(place).epochs.name and not RunFolder(place).config.exists():
        place = place.parent  # the weights of an epoch are in a folder of the run's
    folder = RunFolder.open(str(place))
    return SavedNetwork.read(folder, folder.best if given.is_dir() else given)


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
