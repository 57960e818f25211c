"""The norm over the gradients of all parameters, for the metrics and for clipping."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastadv.engine.packing import packed


def total_norm(gradients: Sequence[Tensor]) -> Tensor:
    """The Euclidean norm over all values of ``gradients``, 0-dim; 0 if there are none."""
    joined = packed(gradients)
    if len(joined) == 1:
        return torch.linalg.vector_norm(joined[0])
    return torch.nn.utils.get_total_norm(joined)
