"""Looks at the outputs of a network for what makes every attack on it fail."""

from __future__ import annotations

import torch
from torch import Tensor

from fastadv.engine.model.precision import rounding
from fastadv.evaluation.attacks.problem import Problem
from fastadv.evaluation.probabilities import are_probabilities

CHECKED_IMAGES = 16
# Passes on batches of other sizes may use other kernels: so far apart, relative to the largest
# output, are the outputs of one image in float32, and so many roundings in a lower precision.
CHANGE, ROUNDINGS = 1e-3, 4


@torch.no_grad()
def masks_of(problem: Problem, clean: Tensor) -> list[Tensor]:
    """0-dim bool: the outputs are probabilities; the outputs change from call to call. ``clean``:
    those at the images of ``problem``. One more pass of a few images, not of all: outputs may also
    change with the other images of a batch. Waits for no device."""
    few = slice(max(1, min(CHECKED_IMAGES, len(clean) - 1)))
    net = problem.net
    allowed = max(CHANGE, ROUNDINGS * rounding(net.attack_dtype, net.model, net.device))
    again = problem.logits(problem.x[few])
    apart = (again - clean[few]).abs().amax()
    changes = apart > allowed * clean[few].abs().amax().clamp(min=1e-30)
    if problem.any_labels:
        return [torch.zeros_like(changes), changes]
    return [are_probabilities(clean[few]), changes]
