"""All searches by name, and the cascades that are known under a name of their own."""

from __future__ import annotations

from fastadv.evaluation.search.apgd import ApgdCe, ApgdDlr, ApgdT
from fastadv.evaluation.search.fab import Fab, FabT
from fastadv.evaluation.search.malt import Malt
from fastadv.evaluation.search.pgd import Cw, CwMargin, Pgd
from fastadv.evaluation.search.pma import Pma
from fastadv.evaluation.search.quick import Quick
from fastadv.evaluation.search.search import Search
from fastadv.evaluation.search.square import Square

_ALL: tuple[type[Search], ...] = (
    Pgd,
    Cw,
    CwMargin,
    ApgdCe,
    ApgdDlr,
    ApgdT,
    Fab,
    FabT,
    Square,
    Pma,
    Malt,
    Quick,
)

SEARCHES: dict[str, type[Search]] = {search.name: search for search in _ALL}

CASCADES = {
    "autoattack": "apgd-ce+apgd-t+fab-t+square",
    "autoattack-plus": "apgd-ce-100-5+apgd-dlr-100-5+fab-100-5+square+apgd-t+fab-t",
    "autoattack-rand": "apgd-ce+apgd-dlr",
}
"""AutoAttack's versions (Croce & Hein, 2020, and the released code). "+" joins searches, each of
which takes the images that those before it did not fool."""

REPEATS = {"autoattack-rand": 20}
"""Passes that are averaged into each gradient."""

SECOND_OPINION = ("apgd-ce-50", "apgd-t-50-3")
"""Searches in the network's own precision of what a cascade in a lower one leaves robust."""


def is_cascade(name: str) -> bool:
    """True if ``name`` is that of several searches."""
    return "+" in name or name.strip().lower() in CASCADES
