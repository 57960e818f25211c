"""Words that ``evaluate`` and ``compare`` take, checked before a run is opened."""

from __future__ import annotations

from fastadv.errors import unknown


def require_words(*, which: str, on: str, search_dtype: str, mode: str) -> None:
    """Raise ``UserError``, with the nearest known word, for one that is none."""
    from fastadv.evaluation.attacks.inputs import MODES, SEARCH_DTYPES
    from fastadv.run.source import SETS
    from fastadv.run.which import weights_named

    weights_named(which)
    for kind, word, known in (
        ("set of images", on, SETS),
        ("search dtype", search_dtype, SEARCH_DTYPES),
        ("mode", mode, MODES),
    ):
        if word not in known:
            raise unknown(kind, word, known)
