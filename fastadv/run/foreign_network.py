"""A network whose weights are a file from elsewhere."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import nn

from fastadv.errors import UserError
from fastadv.models import MODELS, VARIANTS, build_model
from fastadv.models.foreign_names import sizes, translated
from fastadv.models.packaged import names_own_code
from fastadv.run.noted_network import built_of
from fastadv.storage.printable import printable
from fastadv.storage.weights_file import read_weights, require_fit

OPTIONS = ("width", "depth", *VARIANTS)
"""What ``build_model`` is told of a network besides its name and the data's facts."""
_COUNTS = {"num_classes": "classes", "in_channels": "channels"}
_SCALE = ("normalize.mean", "normalize.std")


class Network(NamedTuple):
    """A network with weights from a file. ``options``: its sizes and variants; ``renamed``: the
    tensors had the names of other code; ``scaled_by``: whose mean and deviation scale the pixels
    before the network, if any do."""

    model: nn.Module
    name: str
    options: dict[str, Any]
    renamed: bool
    scaled_by: Literal["file", "caller", None]


def load_network(
    weights: str,
    name: str | None,
    facts: Mapping[str, Any],
    options: Mapping[str, Any],
    what: str = "the call",
) -> Network:
    """The network ``name`` of ``build_model`` with the weights in the file ``weights``, on the CPU,
    in eval mode.

    ``name`` None: as a file of ``fastadv export`` says. ``facts`` are the keywords of
    ``build_model`` about the images, None or left out where they are not known. Classes, channels
    and sizes of fastadv's own networks are those of the tensors, with which the facts of ``what``
    must agree. "mean" and "std" are for files without such numbers of their own. ``options`` are
    those of the network. Raises ``UserError`` for a file that cannot be read or does not fit.
    """
    path = Path(weights)
    shown = printable(path)
    state, notes = read_weights(path)
    name, noted = _described(name, notes, shown, len(state))
    state, renamed = translated(name, state, shown)
    # A file of ours without its first or last layer fits nothing, whatever the numbers are.
    ours = {"num_classes": 1, "in_channels": 1} if name in MODELS else {}
    known = ours | noted | (sizes(name, state) if ours else {})
    build: dict[str, Any] = {
        "image_size": known.pop("image_size", facts.get("image_size")),
        "dropout": known.pop("dropout", 0.0),
    }
    build |= {
        key: agreed(key, facts.get(key), known.pop(key, None), shown, what) for key in _COUNTS
    }
    chosen = _usual(name) | known | dict(options)
    build |= chosen
    scale = {key: facts[key] for key in ("mean", "std") if facts.get(key) is not None}
    scaled_by: Literal["file", "caller", None] = "caller" if scale else None
    with torch.random.fork_rng([]):  # initial weights, which are overwritten at once
        # First without memory, of which a number in the file could ask for all there is.
        with nullcontext() if names_own_code(name) else torch.device("meta"):
            expected = build_model(name, **build).state_dict()
        if _SCALE[0] in state and _SCALE[0] not in expected:
            if scale:
                raise UserError(
                    f"{shown} has its own mean and deviation of the pixels; omit those of the "
                    "data, --normalize."
                )
            channels = build["in_channels"]
            expected |= dict.fromkeys(_SCALE, torch.empty(1, channels, 1, 1))
            scale, scaled_by = {"mean": [0.0] * channels, "std": [1.0] * channels}, "file"
        require_fit(expected, state, path, name)
        model = build_model(name, **build, **scale)
    model.load_state_dict({**model.state_dict(), **state})
    return Network(model.eval(), name, chosen, renamed, scaled_by)


def agreed(fact: str, asked: int | None, own: int | None, shown: str, what: str) -> int:
    """The number of classes or channels, of which the file and ``what`` both may say something."""
    if asked is None and own is None:
        raise UserError(
            f"{shown} does not say for how many {_COUNTS[fact]} its network is: pass {fact}=."
        )
    if asked is not None and own is not None and asked != own:
        raise UserError(
            f"{shown} is of a network for {own} {_COUNTS[fact]}, and {what} has {asked}."
        )
    return own if asked is None else asked  # type: ignore[return-value]


def _described(
    name: str | None, notes: Mapping[str, str], shown: str, tensors: int
) -> tuple[str, dict[str, Any]]:
    """The network's name, and what the notes of ``fastadv export`` say of it."""
    noted = notes.get("model")
    if name is None:
        if noted is None:
            raise UserError(
                f"{shown} does not say which network its weights are of: name it, with --model "
                "or model=."
            )
        if names_own_code(noted):
            raise UserError(
                f"{shown} names code to run, model {printable(noted)}: if you know that module, "
                "name it yourself, with --model or model=."
            )
        name = noted
    if name != noted:
        return name, {}
    return name, built_of(notes, shown, tensors)


def _usual(name: str) -> dict[str, Any]:
    """The published variant that the network ``name`` is, where nothing else is said."""
    if name not in MODELS:
        return {}
    parameters = inspect.signature(MODELS[name]).parameters
    return {key: parameters[key].default for key, names in VARIANTS.items() if name in names}
