"""The slots of a method. Each takes one part. This module imports neither the parts nor torch."""

NONE = "none"

SLOTS = (
    "adversary",
    "attack_loss",
    "start",
    "objective",
    "target",
    "regularizer",
    "weights",
    "layers",
    "averaging",
)

OPTIONAL = ("start", "regularizer", "weights", "averaging")
"""The slots that may be empty: "none" in one of them means no part, and for the start the
adversary's own."""
