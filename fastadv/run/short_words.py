"""Texts and times that must not take more than their columns."""

from __future__ import annotations

import math


def end_of(text: str, width: int) -> str:
    """``text``, or as much of its end as there is room for."""
    return text if len(text) <= width else "…" + text[len(text) - width + 1 :]


def clock(seconds: float | None) -> str:
    """``seconds`` as m:ss, or h:mm:ss; "" for None or what is no number."""
    if seconds is None or math.isnan(seconds):
        return ""
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
