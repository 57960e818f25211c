"""Checkpoints that are whole or not there: written aside, synced, renamed, with a checksum."""

from __future__ import annotations

import errno
import hashlib
import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastadv.errors import UserError

CHECKSUM = "checksum"


def save(path: Path, payload: dict[str, Any]) -> None:
    """Write ``payload`` (dicts, lists, numbers, strings, tensors) to ``path`` atomically.

    A reader sees the old file or the new one, never a part. Raises ``UserError`` when the disk
    is full; the file that was there stays.
    """
    aside = path.with_name(path.name + ".partial")
    try:
        with open(aside, "wb") as file:
            torch.save(payload | {CHECKSUM: _digest(payload)}, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, path)
        _sync_folder(path.parent)
    except (OSError, RuntimeError) as error:
        aside.unlink(missing_ok=True)
        if _is_full(error):
            raise UserError(
                f"No space left on the device to write {path}; what was saved before is intact."
            ) from None
        raise


def write_text(path: Path, text: str) -> None:
    """Replace the text file ``path`` atomically."""
    aside = path.with_name(path.name + ".partial")
    try:
        with open(aside, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, path)
    except OSError as error:
        aside.unlink(missing_ok=True)
        if _is_full(error):
            raise UserError(f"No space left on the device to write {path}.") from None
        raise


def load(path: Path) -> dict[str, Any]:
    """The payload of ``path``, on the CPU, checked against its checksum.

    Raises ``UserError`` when the file is missing, cut short or changed. Nothing in it is executed
    (``weights_only``).
    """
    if not path.is_file():
        raise UserError(f"There is no checkpoint {path}.")
    try:
        payload = torch.load(path, map_location="cpu", weights_only=True)
        digest = payload.pop(CHECKSUM)
    except Exception as error:
        # torch reports a damaged file by many types: RuntimeError, EOFError, UnpicklingError, ...
        raise UserError(
            f"The checkpoint {path} cannot be read, it is damaged or not one of fastadv's "
            f"({type(error).__name__})."
        ) from None
    if digest != _digest(payload):
        raise UserError(f"The checkpoint {path} is damaged: its checksum does not match.")
    return dict(payload)


def load_weights(model: torch.nn.Module, state: dict[str, Tensor], path: Path) -> None:
    """Load ``state`` into ``model``, or say in a sentence that it belongs to another one."""
    own = model.state_dict()
    for name in own.keys() ^ state.keys():
        raise UserError(f"{path} belongs to another model: only one of the two has {name!r}.")
    for name, tensor in own.items():
        if tensor.shape != state[name].shape:
            raise UserError(
                f"{path} belongs to another model: its {name} has shape "
                f"{tuple(state[name].shape)}, not {tuple(tensor.shape)}."
            )
    model.load_state_dict(state)


def _digest(payload: Any) -> str:
    hasher = hashlib.blake2b(digest_size=16)
    _feed(hasher, payload)
    return hasher.hexdigest()


def _feed(hasher: Any, value: Any) -> None:
    """Everything a checkpoint holds, tensors by their bytes, in an order that saving keeps."""
    if isinstance(value, dict):
        for key, item in value.items():
            hasher.update(repr(key).encode())
            _feed(hasher, item)
    elif isinstance(value, (list, tuple)):
        hasher.update(str(len(value)).encode())
        for item in value:
            _feed(hasher, item)
    elif isinstance(value, Tensor):
        plain = value.detach().cpu().contiguous()
        hasher.update(f"{plain.dtype}{tuple(plain.shape)}".encode())
        hasher.update(plain.reshape(-1).view(torch.uint8).numpy().data)
    else:
        hasher.update(repr(value).encode())


def _is_full(error: Exception) -> bool:
    # torch's zip writer hides the errno behind a RuntimeError of its own.
    cause = error.__context__
    if isinstance(cause, OSError) and _is_full(cause):
        return True
    return getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or (
        isinstance(error, RuntimeError) and "write" in str(error).lower()
    )


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
