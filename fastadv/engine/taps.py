"""Reach the input of every residual block: read its gradient, add noise to it (APART).

A pre-hook on each block's first convolution does both. Between passes the hooks do nothing, so
the user's model computes what it always did.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from torch import Tensor, nn


class Taps:
    """Hooks on the first convolution of each block in ``convolutions``."""

    def __init__(self, convolutions: Sequence[nn.Module]) -> None:
        self.count = len(convolutions)
        self._seen: dict[int, Tensor] | None = None
        self._noise: list[Tensor] | None = None
        self._handles = [
            convolution.register_forward_pre_hook(self._hook(position))
            for position, convolution in enumerate(convolutions)
        ]

    def _hook(self, position: int) -> Callable[[nn.Module, tuple[Tensor]], tuple[Tensor] | None]:
        def at_block(module: nn.Module, inputs: tuple[Tensor]) -> tuple[Tensor] | None:
            if self._seen is not None:
                self._seen[position] = inputs[0]
            if self._noise is not None:
                return (inputs[0] + self._noise[position],)
            return None

        return at_block

    @contextmanager
    def reading(self) -> Iterator[dict[int, Tensor]]:
        """Collects the tensor that enters each block: position in ``convolutions`` -> tensor."""
        seen: dict[int, Tensor] = {}
        self._seen = seen
        try:
            yield seen
        finally:
            self._seen = None

    @contextmanager
    def adding(self, noise: list[Tensor] | None) -> Iterator[None]:
        """Adds ``noise[b]`` to what enters block b; None adds nothing."""
        self._noise = noise
        try:
            yield
        finally:
            self._noise = None

    def remove(self) -> None:
        """Take the hooks off the model."""
        for handle in self._handles:
            handle.remove()
