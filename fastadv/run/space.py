"""Room on the disk for what a run will write, asked for before it trains."""

from __future__ import annotations

import shutil
from collections.abc import Iterable
from pathlib import Path

from torch import Tensor

from fastadv.engine.process import distributed
from fastadv.errors import UserError
from fastadv.run.keeping import kept
from fastadv.run.run_folder import RunFolder
from fastadv.run.session import Session
from fastadv.storage.printable import printable

_SPARE = 1 << 20  # bytes, for metrics and results


def require_space(folder: RunFolder, session: Session) -> None:
    """Raise ``UserError`` unless the disk has room for the checkpoints of the run in ``folder``.

    That is last.pt, the one before where it is kept, the state to which a guarded run goes back,
    and the file that is about to replace last.pt.
    What parts keep per sample is not known yet before the first update, nor is a user's quota.
    """
    if distributed.rank() != 0:
        return
    needed = _needed(folder, session)
    try:
        free = shutil.disk_usage(folder.path).free
    except OSError:
        return
    if free < needed:
        raise UserError(
            f"The checkpoints in {printable(folder.path)} will take about {needed / 1e6:,.0f} MB "
            f"more, and {free / 1e6:,.0f} MB are free there: make room, or choose another --out."
        )


def _needed(folder: RunFolder, session: Session) -> int:
    """Bytes that the run will take besides those of its files now."""
    keep = kept(session.config.keep)
    model = _bytes(session.model.state_dict().values())
    moments = 2 if "betas" in session.optimizer.defaults else 1
    checkpoint = model + moments * _bytes(session.model.parameters())
    checkpoint += _bytes(session.step.state.values())
    goes_back = session.config.guard_overfitting == "back"
    whole = (2 + keep.previous + goes_back) * checkpoint + (2 * model if keep.best else 0)
    there = sum(map(_size, {folder.last, folder.previous, folder.best, folder.guarded}))
    return max(whole - there, checkpoint) + _SPARE


def _bytes(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def _size(path: Path) -> int:
    """Bytes of a file; 0 if there is none."""
    try:
        return path.lstat().st_size
    except OSError:
        return 0
