"""Hooks at the input of every residual block: they read its gradient and add noise to it (APART).

A pre-hook on one module of each block does both. It is registered during the passes of a step only,
so between calls the user's model has no such hook and can be copied, saved and used in another
step.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fastadv.engine.model.pending import plain
from fastadv.engine.model.recomputed import in_backward
from fastadv.errors import UserError


class BlockHooks:
    """Hooks on one module of each block. ``convolutions`` are these modules (most often the first
    convolution of the block), ``names`` their names."""

    def __init__(self, names: Sequence[str], convolutions: Sequence[nn.Module]) -> None:
        self.names = list(names)
        self.convolutions = list(convolutions)
        self.seen: dict[int, Tensor] | None = None
        self.noise: list[Tensor] | None = None
        self._hooks = [_BlockHook(self, block) for block in range(self.count)]

    @property
    def count(self) -> int:
        """The number of blocks."""
        return len(self.convolutions)

    @contextmanager
    def on(self) -> Iterator[None]:
        """The hooks are on the model within this context."""
        try:
            for convolution, hook in zip(self.convolutions, self._hooks, strict=True):
                convolution._forward_pre_hooks[hook.number] = hook
            yield
        finally:
            for convolution, hook in zip(self.convolutions, self._hooks, strict=True):
                convolution._forward_pre_hooks.pop(hook.number, None)

    @contextmanager
    def reading(self) -> Iterator[dict[int, Tensor]]:
        """Collects the input of each block: position in ``convolutions`` -> tensor."""
        seen: dict[int, Tensor] = {}
        self.seen = seen
        try:
            yield seen
        finally:
            self.seen = None

    @contextmanager
    def adding(self, noise: list[Tensor] | None) -> Iterator[None]:
        """Adds ``noise[b]`` to the input of block b; None adds nothing."""
        self.noise = noise
        try:
            yield
        finally:
            self.noise = None


@dataclass(eq=False)
class _BlockHook:
    """The hook of one block."""

    hooks: BlockHooks
    block: int

    @property
    def number(self) -> int:
        """A negative number, since torch numbers registered hooks from 0."""
        return -1 - self.block

    def __call__(self, module: nn.Module, inputs: tuple[Tensor]) -> tuple[Tensor] | None:
        if not torch.compiler.is_compiling() and in_backward():
            raise UserError(
                f"The input of {self.hooks.names[self.block]} is perturbed, and activation "
                "checkpointing would compute it again without the perturbation: checkpoint no "
                "module whose input is perturbed (blocks= names others), or use method fgsm-plus."
            )
        if self.hooks.seen is not None:
            if not torch.compiler.is_compiling():
                inputs = plain(inputs)  # the module must take the tensor that is differentiated
            self.hooks.seen[self.block] = inputs[0]
        if self.hooks.noise is not None:
            return (inputs[0] + self.hooks.noise[self.block],)
        return inputs
