"""What a run keeps in its checkpoints besides tensors of the model, and how it is restored."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastadv.engine.process import distributed
from fastadv.errors import UserError
from fastadv.run import provenance
from fastadv.run.begun import Begun
from fastadv.run.console import Console
from fastadv.run.optimizers import load_state
from fastadv.run.other_processes import taken_over
from fastadv.run.session import Session, built_for
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


@dataclass
class Standing:
    """Where a run stands: its ``progress``, and the ``seen`` of a run that goes on, what the
    metrics of its epoch ("epoch_metrics") and its guard ("guard") have saved."""

    progress: Progress = field(default_factory=Progress)
    seen: Mapping[str, Any] | None = None


def made_for(session: Session) -> dict[str, Any]:
    """What a network was built for besides its configuration, and the test images of its run."""
    test = session.data.test
    return {
        "built_for": built_for(session.data).saved(),
        "test_images": {
            "content": test.content,
            "count": test.count,
            "streamed": session.data.streams,
        },
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
        **made_for(session),
        "optimizer": session.optimizer.state_dict(),
        "step": session.step.state_dict(),
        "progress": asdict(progress),
        "epoch_metrics": epoch_metrics,
        "processes": distributed.collected(_rank_local(session)),
        "data": _sizes(session),
        "files": None if session.data.files is None else session.data.files.listing.state(),
        "provenance": recorded,
    }


def _own_state(session: Session, saved: Any, console: Console) -> dict[str, Tensor]:
    """The rank-local state of this process; with ``bn`` "global" there is none."""
    if session.config.bn == "global":
        return {}
    states = [each["state"] for each in saved["processes"]]
    world, plan = distributed.world_size(), session.step.plan
    own, told = taken_over(plan, states, distributed.rank(), world)
    for sentence in told:
        console.warn(sentence)
    return own


def restore(session: Session, begun: Begun, console: Console) -> Standing:
    """Take the run up where its checkpoint ends. Raises ``UserError`` for one of another run."""
    saved, path = begun.saved, begun.folder.last
    assert saved is not None
    try:
        progress = Progress(**saved["progress"])
        for name, now in _sizes(session).items():
            if saved["data"][name] != now:
                raise UserError(
                    f"The run had {saved['data'][name]} {name}, now there are {now}: resume with "
                    "the same data on as many processes."
                )
        if progress.epoch + bool(progress.batch) > session.config.epochs:
            raise UserError(
                f"The run has trained for more than {session.config.epochs} epochs already, which "
                "config.toml now says: restore it, or make it longer."
            )
        missing = 0 if session.data.files is None else session.data.files.missing
        if missing:
            console.warn(
                f"{missing} images that the run was begun with are not there any more; it goes on "
                "without them, so not bit for bit."
            )
        for sentence in provenance.compare(saved["provenance"], provenance_of(session)):
            console.warn(sentence)
        take_over(session, saved, path, console)
    except (KeyError, TypeError, ValueError, AttributeError, RuntimeError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(
            f"The checkpoint {printable(path)} does not belong to this run "
            f"({printable(str(error))})."
        ) from None
    return Standing(progress, {name: saved.get(name) for name in ("epoch_metrics", "guard")})


def take_over(session: Session, saved: Mapping[str, Any], path: Path, console: Console) -> None:
    """Load model, optimizer, step and generators from the ``contents`` that were in ``path``."""
    checkpoint.load_weights(session.model, saved["model"], path)
    load_state(session.optimizer, saved["optimizer"])
    own = dict(enumerate(saved["processes"])).get(distributed.rank(), {})
    session.step.load_state_dict(saved["step"], _own_state(session, saved, console))
    if "rng" in own:
        torch.set_rng_state(own["rng"])
    if "cuda_rng" in own and session.device.type == "cuda":
        torch.cuda.set_rng_state(own["cuda_rng"], session.device)
