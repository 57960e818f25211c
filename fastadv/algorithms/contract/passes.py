"""The kinds of passes of a network over one batch, in which the cost of a method is counted."""

from __future__ import annotations

from typing import NamedTuple

FORWARD = "forward"
INPUT_GRADIENT = "input gradient"
TRAINING = "training"
SHARED = "shared"
DOUBLE_BACKWARD = "double backward"

UNITS = {FORWARD: 1, INPUT_GRADIENT: 2, TRAINING: 3, SHARED: 4, DOUBLE_BACKWARD: 6}
"""The cost of a pass in forward passes. A backward pass to the input costs one forward pass; a
backward pass to the input and the weights costs two. SHARED is one forward pass with both
backward passes, one after the other. DOUBLE_BACKWARD differentiates an input gradient: each of
the two products per layer has two derivatives, and each derivative costs as much as a product."""


class Pass(NamedTuple):
    """One kind of pass; ``bn`` is the mode of BatchNorm in it, "train" or "eval"."""

    kind: str
    bn: str
