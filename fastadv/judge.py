"""Read a finished run: judge its weights, or write them out."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save
from torch import nn

from fastadv import checkpoint, files
from fastadv.config import TrainConfig
from fastadv.errors import UserError, unknown
from fastadv.evaluation import evaluate
from fastadv.intervals import Scores
from fastadv.models import VARIANTS
from fastadv.printable import printable
from fastadv.run_folder import RunFolder
from fastadv.saved_models import check_fit
from fastadv.session import choose_device, data_facts, make_model
from fastadv.source import Source, open_source
from fastadv.threat import parse_number

WEIGHTS = ("best", "last")


def load_run(path: str, which: str) -> tuple[TrainConfig, Source, nn.Module]:
    """Configuration, data and network of the run in ``path``, with its best or last weights."""
    folder = RunFolder.open(path)
    if which not in WEIGHTS:
        raise unknown("weights", which, WEIGHTS)
    config = folder.read_config()
    last = folder.averaged if folder.averaged.exists() else folder.last
    file = folder.best if which == "best" else last
    state = checkpoint.load(file).get("model")
    data = open_source(config, choose_device(config.device))
    check_fit(config, data_facts(data), state, file)
    model = make_model(config, data)
    checkpoint.load_weights(model, state, file)
    return config, data, model


def judge_run(
    path: str,
    attacks: str,
    *,
    which: str = "best",
    eps: str | None = None,
    alpha: str | None = None,
    limit: int | None = None,
    seed: int = 0,
) -> Scores:
    """Test accuracy in [0,1] by attack; ``eps`` is the run's unless given, and so is the step
    ``alpha`` of attacks with several steps (of another ball: the usual one for it). All test
    images are judged, or ``limit`` of them, each class in proportion, whatever the run's own
    ``--test-limit`` was."""
    config, data, model = load_run(path, which)
    device = choose_device(config.device)
    if limit is not None and limit < 1:
        raise UserError(f"--limit must be at least 1, not {limit}.")
    images = data.test.limited(limit)
    radius = config.eps if eps is None else parse_number(eps, "eps")
    step: float | str | None = alpha
    if alpha is None and eps is None:
        step = config.judge_alpha
    return evaluate(
        model.to(device),
        images,
        attacks.split(","),
        eps=float(radius or 0.0),
        norm=config.norm,
        alpha=step,
        seed=seed,
    )


def export_run(path: str, out: Path, which: str = "best") -> None:
    """Write the weights of a run as a safetensors file, with what is needed to rebuild it."""
    config, data, model = load_run(path, which)
    facts = {
        "method": config.method,
        "model": str(config.model),
        "width": str(config.width),
        "depth": str(config.depth),
        **{name: str(getattr(config, name)) for name in VARIANTS},
        "normalize": str(config.normalize),
        "dropout": str(config.dropout),
        "in_channels": str(data.channels),
        "num_classes": str(data.num_classes),
        "torch": torch.__version__,
    }
    tensors = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    try:
        with files.replaced(out) as file:  # a link in its place is not written through
            file.write(save(tensors, metadata=facts))
    except (OSError, SafetensorError) as error:
        raise UserError(f"Cannot write {printable(out)}: {error}.") from None
