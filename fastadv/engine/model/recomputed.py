"""Activation checkpointing: a backward pass computes a part of the forward pass again.

The parts that are computed again are in training mode, so they move BatchNorm's running statistics
once more, and whatever reads those afterwards computes with other numbers than without
checkpointing. The buffers are therefore kept during the backward passes of a model that does so.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from fastadv.engine.gradient import gradients_if_used, leaf


def moves_buffers_backward(model: nn.Module, logits: Callable[[Tensor], Tensor], x: Tensor) -> bool:
    """True if a backward pass through ``logits(x)`` changes a buffer of ``model``. The caller
    restores the buffers."""
    buffers = [buffer for buffer in model.buffers() if buffer.is_floating_point()]
    if not buffers:
        return False
    try:
        with torch.enable_grad():
            given = leaf(x)
            loss = logits(given).sum()
            # Their versions do not tell: BatchNorm's kernels write without counting them up.
            before = [buffer.clone() for buffer in buffers]
            gradients_if_used(loss, [given])
    except Exception:  # a model that fails here takes the slower, safe way
        return True
    return not all(map(torch.equal, before, buffers))


def in_backward() -> bool:
    """True inside of a backward pass: what runs there is computed again."""
    return torch._C._current_graph_task_id() != -1
