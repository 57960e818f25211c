"""Atomic checkpoints: written to a second file, synced, renamed, with a checksum."""

from __future__ import annotations

import errno
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastadv.errors import UserError
from fastadv.storage import checkpoint_file, files
from fastadv.storage.digests import digest
from fastadv.storage.printable import printable
from fastadv.storage.writable import writable

CHECKSUM = "checksum"
_MOST_VALUES = 1_000_000  # dicts, numbers, texts and tensors of one checkpoint


def save(path: Path, payload: dict[str, Any]) -> None:
    """Write ``payload`` (dicts, lists, numbers, strings, tensors) to ``path`` atomically.

    A reader sees the old file or the new one, never a part. Raises ``UserError`` when the disk
    is full, and for what ``load`` would not take (``writable``); the file that was there stays.
    """
    payload = writable(payload)
    sealed = payload | {CHECKSUM: digest(payload)}
    try:
        with files.replaced(path) as file:
            torch.save(sealed, file)
    except (OSError, RuntimeError) as error:
        raise _told(error, path, "; what was saved before is intact") from error


def write_text(path: Path, text: str) -> None:
    """Replace the text file ``path`` atomically."""
    try:
        with files.replaced(path) as file:
            file.write(text.encode("utf-8"))
    except OSError as error:
        raise _told(error, path) from error


def load(path: Path) -> dict[str, Any]:
    """The payload of ``path``, on the CPU, checked against its checksum.

    Raises ``UserError`` when the file is missing, cut short, changed or larger inside than outside.
    Nothing in it is executed (``checkpoint_file``).
    """
    try:
        with files.regular(path) as file:
            payload = checkpoint_file.read(file)
        checkpoint_file.count_values(payload, _MOST_VALUES)
        saved = payload.pop(CHECKSUM)
        found = digest(payload)
    except FileNotFoundError:
        raise UserError(f"There is no checkpoint {printable(path)}.") from None
    except UserError:
        raise
    except Exception as error:
        # A damaged file shows by many types: BadZipFile, EOFError, UnpicklingError, KeyError, ...
        raise UserError(
            f"The checkpoint {printable(path)} cannot be read: it is damaged or not a checkpoint "
            f"of fastadv ({type(error).__name__})."
        ) from None
    if saved != found:
        raise UserError(
            f"The checkpoint {printable(path)} is damaged: its checksum does not match."
        )
    return dict(payload)


def load_weights(model: torch.nn.Module, state: object, path: Path) -> None:
    """Load ``state`` into ``model``. Raises ``UserError`` if it belongs to another model."""
    model.load_state_dict(check_weights(model, state, path))


def check_weights(model: torch.nn.Module, state: object, path: Path) -> dict[str, Tensor]:
    """``state`` if it has the names, shapes and types of ``model``'s and no value that is NaN.

    ``model`` may be on the device "meta", to be looked at before memory is taken for it.
    """
    shown = printable(path)
    if not isinstance(state, dict) or not all(isinstance(v, Tensor) for v in state.values()):
        raise UserError(f"{shown} holds no network.")
    own = model.state_dict()
    for name in own.keys() ^ state.keys():
        raise UserError(
            f"{shown} belongs to another model: only one of the two has {printable(str(name))!r}."
        )
    for name, tensor in own.items():
        other = state[name]
        if tensor.shape != other.shape or tensor.dtype != other.dtype:
            raise UserError(
                f"{shown} belongs to another model: its {name} has shape "
                f"{tuple(other.shape)} and type {str(other.dtype).removeprefix('torch.')}, not "
                f"{tuple(tensor.shape)} and {str(tensor.dtype).removeprefix('torch.')}."
            )
        if other.is_floating_point() and bool(other.isnan().any()):
            raise UserError(f"{shown} cannot be used: its {name} holds values that are NaN.")
    return state


def _told(error: Exception, path: Path, more: str = "") -> UserError:
    """What stopped the writing of ``path``, as a sentence; what is no matter of files is raised."""
    if _is_full(error):
        return UserError(f"No space left on the device to write {printable(path)}{more}.")
    if isinstance(error, OSError):
        return UserError(f"Cannot write {printable(path)}: {error.strerror}.")
    raise error


def _is_full(error: Exception) -> bool:
    # torch's zip writer hides the errno behind a RuntimeError of its own.
    cause = error.__context__
    if isinstance(cause, OSError) and _is_full(cause):
        return True
    return getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or (
        isinstance(error, RuntimeError) and "write" in str(error).lower()
    )
