"""Variants for adversarial training by robust_overfitting's code and those made from it: the passes
that these codes make for their log, which move BatchNorm's statistics."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fastadv.algorithms.publication import Published
from fastadv.algorithms.recipe import OnData, Variant
from fastadv.algorithms.recipes.publications import with_more

_TWICE: dict[str, Any] = {"bn_passes": ("adversarial", "adversarial")}
_AND_CLEAN: dict[str, Any] = {"bn_passes": ("adversarial", "adversarial", "natural")}
_SAYS = "the passes that the code makes for its log too: x' when the attack ends"

# In the codes with a perturbation of the weights the model goes back to training mode after the
# attack. So their first attack after each test is with BatchNorm's running statistics.
_LATE = (
    "; not built: on CIFAR-10 the attack on the first batch of every later epoch is in eval mode, "
    "since the code goes back to training mode after the attack"
)


def with_clean(
    published: Published,
    *,
    late: bool = False,
    training: Mapping[str, Any] | None = None,
    on_data: Mapping[str, OnData] | None = None,
) -> Variant:
    """A code that forwards x' when the attack ends and x after the update. ``late``: its attacks
    may begin in eval mode."""
    note = f"{_SAYS}, x after the update" + _LATE * late
    return _made(published, note, _AND_CLEAN, training or {}, on_data or {})


def without_clean(published: Published, *, late: bool = True) -> Variant:
    """A code that forwards x' when the attack ends, but not x; ``late`` as in ``with_clean``."""
    return _made(published, _SAYS + _LATE * late, _TWICE, {}, {})


def _made(
    published: Published,
    note: str,
    passes: Mapping[str, Any],
    training: Mapping[str, Any],
    on_data: Mapping[str, OnData],
) -> Variant:
    return Variant(
        source=published.code,
        note=note,
        options=passes,
        training=training,
        on_data=on_data,
        published=with_more(published, **passes),
    )
