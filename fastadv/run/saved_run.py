"""What a run keeps in its checkpoints besides tensors of the model, and how it is restored."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from fastadv.data import is_tree
from fastadv.data.listing import Listing
from fastadv.engine.process import distributed
from fastadv.errors import UserError
from fastadv.run import provenance
from fastadv.run.config import RunConfig
from fastadv.run.console import Console
from fastadv.run.run_folder import RunFolder
from fastadv.run.saved_models import check_fit
from fastadv.run.session import Session, data_facts
from fastadv.run.source import Source
from fastadv.storage import checkpoint
from fastadv.storage.printable import printable


@dataclass
class Progress:
    """Where a run is. ``batch`` counts the batches of ``epoch`` already trained on."""

    epoch: int = 0
    batch: int = 0
    train_seconds: float = 0.0
    eval_seconds: float = 0.0
    best_epoch: int = 0
    best_score: float = -1.0
    best_clean: float = -1.0


def check_weights_fit(config: RunConfig, data: Source, folder: RunFolder) -> None:
    """Check that the folder's weights fit its network before memory is allocated for it."""
    if folder.last.exists():
        saved = checkpoint.load(folder.last).get("model")
        check_fit(config, data_facts(data), saved, folder.last)


def begun_with(folder: RunFolder, config: RunConfig) -> Listing | None:
    """The image files that the run of ``config`` was begun with, if its checkpoint names any."""
    if not is_tree(config.data) or not folder.last.exists():
        return None
    saved = checkpoint.load(folder.last).get("files")
    return None if saved is None else Listing.from_state(saved)


def built_for(session: Session) -> dict[str, Any]:
    """What a network was built for besides its configuration."""
    data = session.data
    return {
        "num_classes": data.num_classes,
        "in_channels": data.channels,
        "image_size": data.image_size,
    }


def provenance_of(session: Session) -> dict[str, Any]:
    return provenance.record(session.config, session.digests(), session.device)


def _sizes(session: Session) -> dict[str, int]:
    """Sizes of the data that must be the same on resume."""
    data = session.data
    return {
        "images": data.num_samples,
        "images to train on": data.trained_on,
        "batches per epoch": len(data.loader),
    }


def _rank_local(session: Session) -> dict[str, Any]:
    """The rank-local state: random generators and the parts' own state, one entry per process."""
    state = {name: tensor.cpu() for name, tensor in session.step.rank_local_state.items()}
    own: dict[str, Any] = {"state": state, "rng": torch.get_rng_state()}
    if session.device.type == "cuda":
        own["cuda_rng"] = torch.cuda.get_rng_state(session.device)
    return own


def contents(
    session: Session, progress: Progress, epoch_metrics: dict[str, Any], recorded: dict[str, Any]
) -> dict[str, Any]:
    """The content of a checkpoint. ``epoch_metrics`` are those of the epoch so far
    (``EpochMetrics.state``), ``recorded`` is from ``provenance_of``."""
    return {
        "model": session.model.state_dict(),
        "built_for": built_for(session),
        "optimizer": session.optimizer.state_dict(),
        "step": session.step.state_dict(),
        "progress": asdict(progress),
        "epoch_metrics": epoch_metrics,
        "processes": distributed.collected(_rank_local(session)),
        "data": _sizes(session),
        "files": None if session.data.files is None else session.data.files.listing.state(),
        "provenance": recorded,
    }


def restore(session: Session, folder: RunFolder, console: Console) -> Progress:
    saved = checkpoint.load(folder.last)
    try:
        progress = Progress(**saved["progress"])
        for name, now in _sizes(session).items():
            if saved["data"][name] != now:
                raise UserError(
                    f"The run had {saved['data'][name]} {name}, now there are {now}: resume with "
                    "the same data on as many processes."
                )
        if progress.best_epoch and not folder.best.exists():
            raise UserError(
                f"{printable(folder.best)} is missing, the weights of epoch {progress.best_epoch}: "
                "restore it, or train into another --out."
            )
        missing = 0 if session.data.files is None else session.data.files.missing
        if missing:
            console.warn(
                f"{missing} images that the run was begun with are not there any more; it goes on "
                "without them, so not bit for bit."
            )
        for sentence in provenance.compare(saved["provenance"], provenance_of(session)):
            console.warn(sentence)
        take_over(session, saved, folder.last)
    except (KeyError, TypeError, ValueError, AttributeError, RuntimeError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(
            f"The checkpoint {folder.last} does not belong to this run ({error})."
        ) from None
    return progress


def take_over(session: Session, saved: dict[str, Any], path: Path) -> None:
    """Load model, optimizer, step and generators from the ``contents`` that were in ``path``."""
    checkpoint.load_weights(session.model, saved["model"], path)
    session.optimizer.load_state_dict(saved["optimizer"])
    # In a run that goes on with more processes the new ones begin with process 0's state; with
    # fewer, that of the others is lost.
    own = dict(enumerate(saved["processes"])).get(distributed.rank(), {})
    session.step.load_state_dict(saved["step"], own.get("state"))
    if "rng" in own:
        torch.set_rng_state(own["rng"])
    if "cuda_rng" in own and session.device.type == "cuda":
        torch.cuda.set_rng_state(own["cuda_rng"], session.device)
