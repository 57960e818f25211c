"""Atomic checkpoints: written to a second file, synced, renamed, with a checksum."""

from __future__ import annotations

import errno
from pathlib import Path
from typing import Any, BinaryIO, cast

import torch
from torch import Tensor

from fastadv.errors import UserError
from fastadv.storage import checkpoint_file, files
from fastadv.storage.digests import digest
from fastadv.storage.printable import printable
from fastadv.storage.writable import writable

CHECKSUM = "checksum"
_FULL = {errno.ENOSPC, getattr(errno, "EDQUOT", errno.ENOSPC)}
_MOST_VALUES = 1_000_000  # dicts, numbers, texts and tensors of one checkpoint


class DamagedError(UserError):
    """The file is not there, or not what was written."""


class NotWrittenError(UserError):
    """The disk is full, or the folder may not be written to."""


def save(path: Path, payload: dict[str, Any], keep_as: Path | None = None) -> None:
    """Write ``payload`` (dicts, lists, numbers, strings, tensors) to ``path`` atomically.

    A reader sees the old file or the new one, never a part. The old one is called ``keep_as`` from
    then on. Raises ``UserError`` when the disk is full, and for what ``load`` would not take
    (``writable``); the file that was there stays.
    """
    payload = writable(payload)
    sealed = payload | {CHECKSUM: digest(payload)}
    output = None
    try:
        with files.replaced(path, keep_as) as file:
            output = _Output(file)
            torch.save(sealed, cast(BinaryIO, output))
    except OSError as error:
        raise not_written(error, path) from error
    except RuntimeError as error:  # of torch's zip writer, which hides what the file said
        if output is None or output.error is None:
            raise
        raise not_written(output.error, path) from error


def write_text(path: Path, text: str) -> None:
    """Replace the text file ``path`` atomically. Raises ``UserError`` as ``save`` does."""
    try:
        with files.replaced(path) as file:
            file.write(text.encode("utf-8"))
    except OSError as error:
        raise not_written(error, path) from error


class _Output:
    """A file to write to, which notes the first ``error``."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self.error: OSError | None = None

    def write(self, content: Any) -> int:
        try:
            return self._file.write(content)
        except OSError as error:
            self.error = self.error or error
            raise

    def flush(self) -> None:
        try:
            self._file.flush()
        except OSError as error:
            self.error = self.error or error
            raise


def load(path: Path) -> dict[str, Any]:
    """The payload of ``path``, on the CPU, checked against its checksum.

    Raises ``DamagedError`` when the file is missing, cut short, changed or larger inside than
    outside, and ``UserError`` when it may not be read. Nothing in it is executed
    (``checkpoint_file``).
    """
    try:
        with files.regular(path) as file:
            payload = checkpoint_file.read(file)
        checkpoint_file.count_values(payload, _MOST_VALUES)
        saved = payload.pop(CHECKSUM)
        found = digest(payload)
    except FileNotFoundError:
        raise DamagedError(f"There is no checkpoint {printable(path)}.") from None
    except UserError:
        raise
    except PermissionError as error:
        raise UserError(f"Cannot read {printable(path)}: {files.reason(error)}.") from None
    except MemoryError:
        raise UserError(f"There is not enough memory to read {printable(path)}.") from None
    except Exception as error:
        # A damaged file shows by many types: BadZipFile, EOFError, UnpicklingError, KeyError, ...
        raise DamagedError(
            f"The checkpoint {printable(path)} cannot be read: it is damaged or not a checkpoint "
            f"of fastadv ({type(error).__name__})."
        ) from None
    if saved != found:
        raise DamagedError(
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


def not_written(error: OSError, path: Path) -> UserError:
    """What stopped the writing of ``path``, as a sentence."""
    if error.errno in _FULL:
        why = f"No space left on the device to write {printable(path)}"
    else:
        why = f"Cannot write {printable(path)}: {files.reason(error)}"
    return NotWrittenError(f"{why}; what was saved before is intact.")
