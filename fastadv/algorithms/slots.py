"""The slots of a method, one part each; known without importing the parts and torch with them."""

NONE = "none"

SLOTS = ("adversary", "objective", "target", "regularizer", "weights", "layers", "averaging")

OPTIONAL = ("regularizer", "weights", "averaging")
"""Slots that may be empty; "none" there means no part at all."""
