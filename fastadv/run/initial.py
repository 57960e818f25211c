"""Weights that a run begins with: those of another run, or of a file from elsewhere."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from fastadv.errors import UserError
from fastadv.models.foreign_names import translated
from fastadv.run.config import RunConfig
from fastadv.run.run_folder import RunFolder
from fastadv.run.saved_models import read_saved
from fastadv.storage.digests import digest
from fastadv.storage.printable import printable
from fastadv.storage.weights_file import read_weights, require_fit

DIGEST = "initial weights"
"""The name of their digest among those of a run (``Session.digests``)."""
_FROM_FILE = "pixels scaled by the mean and deviation in the file, not by those of the data"
_SCALING = ("normalize.mean", "normalize.std")


class Initial(NamedTuple):
    """``digest`` of the weights as they were found; ``said``: how they were understood, in words
    ("" for a run that has begun, which holds them itself)."""

    digest: str
    said: str = ""


def begin_with(config: RunConfig, model: nn.Module, num_classes: int) -> Initial:
    """Load the weights ``config.init`` into the new ``model`` of ``config``.

    ``config.init`` is a run folder (its best weights), a checkpoint in one, or a weights file from
    elsewhere, under the names of public code. A classifier for another number of classes than
    ``num_classes`` is left as it was drawn. A mean and deviation in the file replace those of the
    data, with which its weights were not trained. Raises ``UserError`` for weights of another
    network.
    """
    assert config.init is not None
    path, shown = Path(config.init), printable(config.init)
    state, of_run, renamed = _read(config, path)
    found = digest({name: state[name].contiguous() for name in sorted(state)})
    own: dict[str, Tensor] = model.state_dict()
    said = [] if of_run is None else [f"weights of {printable(of_run.method)}"]
    said += ["under the names of other code"] if renamed else []
    said += [_scaling(state, own, of_run, config, shown)]
    head = _other_head(state, own, num_classes)
    if head is not None:
        before = len(state[head[0]])
        named = head[0].rpartition(".")[0]
        said.append(f"new classifier {named}: {num_classes} classes, {before} in the file")
        state = {name: value for name, value in state.items() if name not in head}
    left = {n: v for n, v in own.items() if n in state or n not in (*(head or ()), *_SCALING)}
    require_fit(left, state, path, config.model)
    model.load_state_dict({**own, **state})
    return Initial(found, "; ".join(filter(None, said)))


def _read(config: RunConfig, path: Path) -> tuple[dict[str, Tensor], RunConfig | None, bool]:
    """The weights in ``path``; the configuration of the run they are of, or None; true if they had
    the names of other code."""
    if path.is_dir() or (path.suffix == ".pt" and _in_run(path)):
        found = read_saved(str(path))
        return dict(found.saved["model"]), found.config, False
    state, _ = read_weights(path)
    state, renamed = translated(config.model, state, printable(path))
    return state, None, renamed


def _in_run(path: Path) -> bool:
    places = [path.parent, *([path.parent.parent] if path.parent.name == "epochs" else [])]
    return any(RunFolder(place).config.exists() for place in places)


def _scaling(
    state: Mapping[str, Tensor],
    own: Mapping[str, Tensor],
    of_run: RunConfig | None,
    config: RunConfig,
    shown: str,
) -> str:
    """What is to be said of how pixels are scaled. Raises ``UserError`` if the network of the
    weights scales them and the new one does not, or the other way round."""
    theirs, ours = _SCALING[0] in state, _SCALING[0] in own
    if of_run is not None and of_run.normalize != config.normalize:
        does = "scales pixels by a mean and deviation" if of_run.normalize else "takes pixels as is"
        flag = "--normalize" if of_run.normalize else "--no-normalize"
        raise UserError(f"The network in {shown} {does}, and this run's does not: add {flag}.")
    if theirs and not ours:
        raise UserError(
            f"{shown} has its own mean and deviation of the pixels, and this run's network has "
            "none: omit --no-normalize."
        )
    if theirs:
        return "" if all(_close(state[name], own[name]) for name in _SCALING) else _FROM_FILE
    if of_run is None and config.normalize:
        return (
            f"pixels scaled by the mean and deviation of {printable(config.data)} "
            "(--no-normalize: as they are, from 0 to 1)"
        )
    return ""


def _close(one: Tensor, other: Tensor) -> bool:
    return one.numel() == other.numel() and torch.allclose(
        one.flatten().float(), other.flatten().float().cpu(), atol=1e-4
    )


def _other_head(
    state: Mapping[str, Tensor], own: Mapping[str, Tensor], num_classes: int
) -> list[str] | None:
    """The names of the classifier in ``state``, if it is for another number of classes: all that
    does not fit is in one module, and differs in the first dimension alone."""
    wrong = [name for name in state if name in own and state[name].shape != own[name].shape]
    modules = {name.rpartition(".")[0] for name in wrong}
    alike = all(
        own[name].shape[:1] == (num_classes,) and own[name].shape[1:] == state[name].shape[1:]
        for name in wrong
    )
    return wrong if len(modules) == 1 and alike else None
