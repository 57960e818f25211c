"""The network that the notes in an exported file say of it (``fastadv.run.export_notes``)."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from fastadv.declared import parse_number
from fastadv.errors import UserError
from fastadv.models import MODELS, VARIANTS
from fastadv.storage.printable import printable

_SIZES = ("width", *VARIANTS)
_COUNTS = ("num_classes", "in_channels")
_MOST = 65536  # of any number that a network is built of


def built_of(notes: Mapping[str, str], shown: str, tensors: int) -> dict[str, Any]:
    """The keywords of ``build_model`` that the ``notes`` in the file ``shown`` with so many
    ``tensors`` hold, but for the name of the network and what the tensors show: "mean", "std", and
    the "depth" of fastadv's own networks. Raises ``UserError`` for a value that no network has."""
    found: dict[str, Any] = {}
    own = notes.get("model") in MODELS
    for name in (*_SIZES, *_COUNTS, *(() if own else ("depth",))):
        text = notes.get(name, "None")
        if text != "None":
            plain = name in VARIANTS and not text.isdecimal()  # the others are numbers
            found[name] = text if plain else _count(text, shown)
    if found.get("depth", 0) > tensors:  # before so many layers are built
        raise UserError(f"{shown} says a depth that its {tensors} tensors do not have.")
    if "dropout" in notes:
        found["dropout"] = parse_number(notes["dropout"], f"dropout in {shown}")
    if "image_size" in notes:
        found["image_size"] = _size(notes["image_size"], shown)
    return found


def _count(text: str, shown: str) -> int:
    if len(text) > 5 or not text.isdecimal():
        raise UserError(f"{shown} says a number that no network has, {printable(text)}.")
    return int(text)


def _size(text: str, shown: str) -> tuple[int, int]:
    try:
        height, width = json.loads(text)
    except (ValueError, TypeError, RecursionError):
        height = width = None
    if not all(type(side) is int and 0 < side <= _MOST for side in (height, width)):
        raise UserError(f"{shown} says a size that no image has, {printable(text[:40])}.")
    return height, width
