"""The slots of a method. Each takes one part. This module imports neither the parts nor torch."""

NONE = "none"

SLOTS = ("adversary", "objective", "target", "regularizer", "weights", "layers", "averaging")

OPTIONAL = ("regularizer", "weights", "averaging")
"""The slots that may be empty: "none" in one of them means no part."""
