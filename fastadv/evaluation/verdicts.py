"""The verdict on every image of an evaluation, and the file that holds it.

An ``.npz`` file of plain arrays, so that ``numpy.load`` alone can read it. It is written atomically
and read with every size checked before memory is allocated, since it may come from anywhere.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fastadv.data.npz_file import NotPlain, open_npz
from fastadv.errors import UserError
from fastadv.evaluation.intervals import wilson
from fastadv.storage import files
from fastadv.storage.printable import printable

FACTS: dict[str, type] = {
    "attack": str,
    "norm": str,
    "eps": float,
    "seed": int,
    "weights": str,
    "images": str,
}
"""What every file says. ``eps`` is in pixels of [0,1], ``weights`` the digest of the network's
state, ``images`` that of all images and labels of the set which ``index`` counts."""

_TYPES = {"index": "i8", "label": "i8", "right": "?", "margin": "f4", "fooled_by": "i2"}
_MOST_IMAGES = 1 << 28
_MOST_TEXT = 1 << 20  # bytes of ``stages`` and of ``facts``


@dataclass(frozen=True, eq=False)
class Verdicts:
    """The verdicts on N images under one attack, one entry per image, rows in ascending order.

    ``index`` (N,) int64: the image's row in its data set. ``label`` (N,) int64: its class.
    ``right`` (N,) bool: classified correctly under the attack. ``margin`` (N,) float32: the
    smallest difference of logits, the label's minus the largest other one, that the attack has
    seen; nan where none is known. ``fooled_by`` (N,) int16: the stage that fooled it, -1 where the
    image is right. ``stages``: the attacks of a cascade in their order, or the one attack; where
    images were wrong before any attack, the first stage is "clean". ``facts``: the settings, at
    least those of ``FACTS``.

    Raises ``UserError`` unless all this holds.
    """

    index: np.ndarray
    label: np.ndarray
    right: np.ndarray
    margin: np.ndarray
    fooled_by: np.ndarray
    stages: tuple[str, ...]
    facts: Mapping[str, Any]

    def __post_init__(self) -> None:
        fault = _fault(self)
        if fault is not None:
            raise UserError(f"These are no verdicts: {fault}.")

    @classmethod
    def collected(
        cls,
        arrays: Mapping[str, Any],
        stages: Sequence[str],
        facts: Mapping[str, Any],
    ) -> Verdicts:
        """Verdicts whose images came in any order: ``arrays`` by field name, (N,) each, numpy or
        tensors on the CPU."""
        plain = {name: np.asarray(arrays[name]).astype(kind) for name, kind in _TYPES.items()}
        order = np.argsort(plain["index"], kind="stable")
        ordered = {name: values[order] for name, values in plain.items()}
        return cls(**ordered, stages=tuple(stages), facts=dict(facts))

    def __len__(self) -> int:
        return len(self.index)

    @property
    def accuracy(self) -> float:
        """The share of images in [0,1] that are right."""
        return float(self.right.mean())

    @property
    def interval(self) -> tuple[float, float]:
        """The 95 % interval of the accuracy (Wilson)."""
        return wilson(self.accuracy, len(self))

    def fooled(self) -> dict[str, int]:
        """The number of images that each stage fooled."""
        counts = np.bincount(self.fooled_by[~self.right], minlength=len(self.stages))
        return dict(zip(self.stages, counts.tolist(), strict=True))

    def write(self, path: Path) -> None:
        """Write the file ``path``, complete or not at all. Raises ``UserError``."""
        arrays: dict[str, np.ndarray] = {
            name: getattr(self, name).astype(kind, copy=False) for name, kind in _TYPES.items()
        }
        arrays["stages"] = np.array(self.stages)
        arrays["facts"] = np.array([json.dumps(dict(self.facts))])
        try:
            with files.replaced(path) as file:
                np.savez(file, **arrays)  # type: ignore[arg-type]
        except OSError as error:
            raise UserError(f"Cannot write {printable(path)}: {error.strerror}.") from None

    @classmethod
    def read(cls, path: Path) -> Verdicts:
        """The verdicts in the file ``path``. Raises ``UserError`` for anything else."""
        try:
            return cls(**_read(path))
        except FileNotFoundError:
            raise UserError(f"There is no file {printable(path)} with verdicts.") from None
        except OSError as error:
            raise UserError(f"Cannot read {printable(path)}: {error.strerror}.") from None
        except (NotPlain, UserError, ValueError, RecursionError) as error:
            raise UserError(
                f"{printable(path)} is damaged or no file of verdicts ({printable(str(error))}); "
                "delete it, and evaluate again."
            ) from None


def _read(path: Path) -> dict[str, Any]:
    with open_npz(path, [*_TYPES, "stages", "facts"], kinds="biufU") as arrays:
        absent = [name for name in (*_TYPES, "stages", "facts") if name not in arrays]
        if absent:
            raise NotPlain(f"it lacks {', '.join(absent)}")
        for name, kind in _TYPES.items():
            member = arrays[name]
            if member.dtype != np.dtype(kind) or len(member.shape) != 1:
                raise NotPlain(f"{name} is {member.dtype} {member.shape}")
            if member.shape[0] > _MOST_IMAGES:
                raise NotPlain(f"{name} has {member.shape[0]} entries")
        for name in ("stages", "facts"):
            member = arrays[name]
            if member.dtype.kind != "U" or len(member.shape) != 1 or member.nbytes > _MOST_TEXT:
                raise NotPlain(f"{name} is {member.dtype} {member.shape}")
        found: dict[str, Any] = {name: arrays[name].whole() for name in _TYPES}
        stages, facts = arrays["stages"].whole().tolist(), arrays["facts"].whole().tolist()
    if len(facts) != 1:
        raise NotPlain(f"facts has {len(facts)} entries")
    return found | {"stages": tuple(stages), "facts": json.loads(facts[0])}


def _fault(found: Verdicts) -> str | None:
    """What is wrong with ``found``, or None."""
    count = found.index.shape[0] if found.index.ndim == 1 else -1
    for name, kind in _TYPES.items():
        values = getattr(found, name)
        if values.shape != (count,) or values.dtype != np.dtype(kind):
            return f"{name} is {values.dtype} {values.shape}, where index is {found.index.shape}"
    if not count:
        return "there are no images"
    if found.index[0] < 0 or (np.diff(found.index) <= 0).any():
        return "index holds a row twice, below 0 or out of order"
    if found.label.min() < 0:
        return "label holds a negative class"
    if np.isinf(found.margin).any():
        return "margin is not finite"
    if found.fooled_by.min() < -1 or found.fooled_by.max() >= len(found.stages):
        return f"fooled_by names a stage that is none of {len(found.stages)}"
    if (found.right != (found.fooled_by < 0)).any():
        return "right and fooled_by contradict each other"
    return _fault_of_words(found.stages, found.facts)


def _fault_of_words(stages: Sequence[str], facts: Mapping[str, Any]) -> str | None:
    if not stages or not all(stages) or len(set(stages)) != len(stages):
        return "stages are not names, each once"
    if not isinstance(facts, Mapping):
        return "facts is no table"
    for name, kind in FACTS.items():
        if type(facts.get(name)) is not kind:
            return f"facts does not say {name}"
    if not math.isfinite(facts["eps"]) or facts["eps"] < 0:
        return "eps is no radius"
    return None
