"""Weights that someone else wrote: a safetensors file, or what ``torch.save`` wrote, without code.

A ``.pt`` file is read by ``torch.load(weights_only=True)``, which calls nothing that the file names
but believes the sizes it claims: of a stranger's file a safetensors is the safer form.
"""

from __future__ import annotations

import pickle
import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from fastadv.errors import UserError
from fastadv.storage import files
from fastadv.storage.printable import printable

WRAPPED_IN = ("state_dict", "model_state_dict", "model", "net")
"""Where checkpoints keep the weights, beside an optimizer's state and other things."""
WRAPPERS = ("module.", "_orig_mod.")  # what DataParallel and torch.compile put before each name

PROGRAMS = {".pt2": "torch.export.load", ".onnx": "an ONNX runtime"}
"""Suffixes of files that hold a network as a program -> what runs it."""


class Weights(NamedTuple):
    """``state``: name -> tensor on the CPU. ``facts``: the notes in a safetensors file."""

    state: dict[str, Tensor]
    facts: dict[str, str]


def read_weights(path: Path) -> Weights:
    """The weights in ``path``, with the wrappers' prefixes removed from their names.

    Runs no code. Raises ``UserError`` for a missing or damaged file, one that needs code to be
    read, and one without weights.
    """
    try:
        with files.regular(path):  # neither a pipe nor a folder
            pass
    except FileNotFoundError:
        raise UserError(f"There is no file {printable(path)}.") from None
    except OSError as error:
        raise UserError(f"Cannot read {printable(path)}: {error.strerror}.") from None
    if path.suffix in PROGRAMS:
        raise UserError(
            f"{printable(path)} is a program, for {PROGRAMS[path.suffix]}, and no file of weights: "
            "export the run to a .safetensors file too, which is read here."
        )
    if path.suffix == ".safetensors":
        state, facts = _read_safetensors(path)
    else:
        state, facts = _weights_among(_read_torch(path), path), {}
    return Weights(_unwrapped(state, path), facts)


def _read_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118
    except (SafetensorError, OSError, ValueError) as error:
        raise UserError(
            f"{printable(path)} is damaged or no safetensors file ({_reason(error)})."
        ) from None


def _read_torch(path: Path) -> object:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of a TorchScript archive, which is refused below
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        named = re.search(r"(?:GLOBAL|global) (\S+) was not an allowed", str(error))
        if named is None:
            raise _damaged(path, error) from None
        raise UserError(
            f"{printable(path)} names code, {printable(named[1])}, which is not run: where the "
            "file was made, save the weights alone with torch.save(model.state_dict(), FILE)."
        ) from None
    except Exception as error:  # of a damaged file: many types
        if "TorchScript" in str(error):
            raise UserError(
                f"{printable(path)} is a TorchScript program, which is not run: save its weights "
                "with torch.save(torch.jit.load(PATH).state_dict(), FILE)."
            ) from None
        raise _damaged(path, error) from None


def _damaged(path: Path, error: Exception) -> UserError:
    return UserError(
        f"{printable(path)} is damaged or no file of torch.save ({type(error).__name__})."
    )


def _reason(error: Exception) -> str:
    return printable(" ".join(str(error).split()).rstrip("."))


def _weights_among(content: object, path: Path) -> dict[str, Tensor]:
    """``content``, or what it holds under one of the usual names."""
    entries: Mapping[Any, Any] = content if isinstance(content, Mapping) else {}
    for candidate in (entries, *(entries.get(name) for name in WRAPPED_IN)):
        if isinstance(candidate, Mapping) and _is_state(candidate):
            return dict(candidate)
    held = ", ".join(printable(str(name)) for name in list(entries)[:5])
    raise UserError(
        f"{printable(path)} holds no weights, neither as it is nor under {', '.join(WRAPPED_IN)}"
        f"{f' (it holds {held})' if held else ''}: save model.state_dict()."
    )


def _is_state(value: Mapping[Any, Any]) -> bool:
    named = (isinstance(n, str) and isinstance(v, Tensor) for n, v in value.items())
    return bool(value) and all(named)


def _unwrapped(state: Mapping[str, Tensor], path: Path) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for name, tensor in state.items():
        own = name
        while own.startswith(WRAPPERS):
            own = own.partition(".")[2]
        if own in found:
            raise UserError(f"{printable(path)} holds {printable(own)!r} twice.")
        found[own] = tensor.detach()
    return found


def require_fit(
    own: Mapping[str, Tensor], state: Mapping[str, Tensor], path: Path, network: str
) -> None:
    """Raise ``UserError`` unless ``state``, read from ``path``, can replace the state ``own`` of
    ``network``: the same names and shapes, no value that is NaN or infinite.

    ``own`` may be on the device "meta". Only the counters of BatchNorms may be missing.
    """
    shown = printable(path)
    # Files from before PyTorch 0.4.1 have no counters, on which no output depends.
    missing = [n for n in own if n not in state and not n.endswith("num_batches_tracked")]
    unexpected = [name for name in state if name not in own]
    if missing or unexpected:
        parts = [f"it lacks {printable(missing[0])!r} ({len(missing)} in all)"] if missing else []
        if unexpected:
            parts.append(f"it has {printable(unexpected[0])!r} ({len(unexpected)} in all) too many")
        raise UserError(
            f"{shown} does not fit {network}: {' and '.join(parts)}; name the network it was made "
            "with, or its code as module:callable."
        )
    for name, tensor in state.items():
        if tensor.shape != own[name].shape:
            raise UserError(
                f"{shown} does not fit {network}: its {name} has shape {tuple(tensor.shape)}, not "
                f"{tuple(own[name].shape)}."
            )
        plain = tensor.layout == torch.strided and not (tensor.is_quantized or tensor.is_meta)
        if not plain or tensor.is_floating_point() != own[name].is_floating_point():
            raise UserError(f"{shown} cannot be used: its {name} is no plain tensor of numbers.")
        if not bool(torch.isfinite(tensor).all()):
            raise UserError(
                f"{shown} cannot be used: its {name} holds values that are NaN or infinite."
            )
