"""A trained network from a run folder or from one of its checkpoints."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from fastadv.errors import UserError
from fastadv.storage import checkpoint
from fastadv.storage.digests import digest
from fastadv.storage.printable import printable

if TYPE_CHECKING:
    from fastadv.run.config import TrainConfig


def load_model(path: str, num_classes: int, in_channels: int) -> nn.Module:
    """The network of the run in ``path``: a run folder (its best weights) or a .pt file in one.

    Images (B,in_channels,H,W) in [0,1] to logits (B,num_classes); in eval mode, on the CPU. Raises
    ``UserError`` when there is no run, or one for other classes or channels.
    """
    # Imported here: the configuration of a run knows the parts, one of which is distillation.
    from fastadv.run.configured_model import configured_model

    config, saved, weights = _read(path)
    facts: dict[str, Any] = {
        "num_classes": num_classes,
        "in_channels": in_channels,
        # Only their presence matters: the numbers are part of the saved weights.
        "mean": [0.0] * in_channels,
        "std": [1.0] * in_channels,
    }
    check_fit(config, facts, saved, weights)
    model = configured_model(config, **facts)
    checkpoint.load_weights(model, saved, weights)
    return model.eval()


def fingerprint(path: str) -> str:
    """A digest of the network that ``load_model`` gives: what it is built of, and its weights."""
    from fastadv.models import VARIANTS
    from fastadv.models.imported import import_model
    from fastadv.run.provenance import source

    config, saved, _ = _read(path)  # refuses code of strangers
    if ":" in str(config.model):
        import_model(str(config.model))  # found where ``load_model`` will find it
    settings = ("model", "width", "depth", "normalize", *VARIANTS)
    built = {name: getattr(config, name) for name in settings}
    return digest([built, source(str(config.model)), saved])


def _read(path: str) -> tuple[TrainConfig, object, Path]:
    """Configuration and weights of the run that ``path`` is or lies in, and their file."""
    from fastadv.run.provenance import require_own
    from fastadv.run.run_folder import RunFolder

    given = Path(path)
    folder = RunFolder.open(str(given if given.is_dir() else given.parent))
    config = folder.read_config()
    weights = folder.best if given.is_dir() else given
    saved = checkpoint.load(weights)
    if "model" not in saved:
        raise UserError(f"{weights} holds no network.")
    require_own(saved, config, weights)
    return config, saved["model"], weights


def check_fit(config: TrainConfig, facts: dict[str, Any], state: object, path: Path) -> None:
    """Raise ``UserError`` unless ``state`` is of the network ``config`` names.

    Looked at without memory for weights: a width in a file can ask for all there is. Networks of
    one's own are built first; their code was trusted before.
    """
    from fastadv.run.configured_model import configured_model

    if ":" in str(config.model):
        return
    count = len(state) if isinstance(state, dict) else 0
    if (config.depth or 0) > count:
        raise UserError(
            f"{printable(path)} belongs to another model: {count} tensors, depth {config.depth}."
        )
    with torch.device("meta"):
        network = configured_model(config, **facts)
    checkpoint.check_weights(network, state, path)
