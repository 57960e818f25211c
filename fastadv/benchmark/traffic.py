"""The numbers that a network moves between its products, tensor by tensor, if one family of kernels
does BatchNorm, its ReLU and the sums around it.

Such a kernel reads each tensor it needs once and writes each result once. BatchNorm in training
needs two kernels forward (statistics; normalise) and two backward (both sums; the gradient), since
the second needs a result over the whole batch. Nothing is kept in the cache between kernels, and
nothing is done inside a product.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

BN = "BatchNorm"
BEFORE = "sum before BatchNorm"
UNREAD = "sum that only BatchNorm reads"
AFTER = "sum after BatchNorm"
SUM = "other sum"
AT_OUTPUT = "further gradient of BatchNorm's result"
AT_INPUT = "further gradient of BatchNorm's input"
ELSEWHERE = "further gradient of another tensor"
MEAN = "mean of BatchNorm's result"
MOVE = "move"

# Tensors read and written, forward and backward, by BatchNorm's mode; a tensor's rows add up.
MOVED: Mapping[str, Mapping[str, tuple[int, int]]] = {
    # Forward: reads x, and in training reads x again, then writes y. The backward kernels read the
    # gradient and x (the ReLU's mask follows from x); the last one writes the gradient of x.
    BN: {"train": (3, 5), "eval": (2, 3)},
    # The first kernel also reads the other summand, and writes the sum.
    BEFORE: {"train": (2, 0), "eval": (2, 0)},
    # Without statistics one kernel does all, and the backward kernel reads y for its mask.
    UNREAD: {"train": (0, 0), "eval": (-1, 0)},
    # The last kernel also reads the other summand. The mask no longer follows from x: the first
    # backward kernel reads y, and writes the masked gradient, which is that of the summand.
    AFTER: {"train": (1, 2), "eval": (1, 1)},
    SUM: {"train": (3, 0), "eval": (3, 0)},
    # A tensor with several readers has a gradient from each. For BatchNorm's result all backward
    # kernels read each of them, or the first one writes the sum; for its input the last one does.
    AT_OUTPUT: {"train": (0, 2), "eval": (0, 1)},
    AT_INPUT: {"train": (0, 1), "eval": (0, 1)},
    ELSEWHERE: {"train": (0, 3), "eval": (0, 3)},
    # Nothing else reads it: it is not written, and its gradient is one number per channel.
    MEAN: {"train": (-1, -2), "eval": (-1, -1)},
    # Concatenations and pools.
    MOVE: {"train": (2, 2), "eval": (2, 2)},
}


@dataclass
class _Activation:
    """A tensor (B,C,H,W), and the same after a ReLU."""

    work: str | None  # what made it: BN, AFTER, SUM or MOVE; None: a product or anything else
    elements: int  # per image
    readers: int = 0
    normalized: bool = False  # it is the input of a BatchNorm
    rectified: bool = False
    averaged: bool = False


class Traffic:
    """Told of every operation of a forward pass in turn, it counts the elements per image of each
    kind of work in ``MOVED``."""

    def __init__(self) -> None:
        self._known: dict[int, _Activation] = {}
        self._all: list[_Activation] = []
        self._kept: list[Tensor] = []  # so that no other tensor gets the same id

    def note(self, name: str, args: Any, result: Any) -> None:
        """The operation ``name`` (without its overload) gave ``result`` for ``args``."""
        first = result[0] if isinstance(result, tuple) else result
        if name == "mean" or not isinstance(first, Tensor) or first.dim() != 4:
            for source in self._read(args):
                source.averaged = name == "mean"
        elif name in {"relu", "relu_"} and id(args[0]) in self._known:
            rectified = self._known[id(args[0])]
            rectified.rectified = True
            self._is(first, rectified)
        elif "batch_norm" in name:
            for source in self._read(args):
                source.normalized = True
                source.work = BEFORE if source.work == SUM else source.work
            self._made(first, BN)
        elif name in {"add", "add_"}:
            self._sum(first, args)
        else:
            self._read(args)
            self._made(first, MOVE if name == "cat" or "pool" in name else None)

    def elements(self) -> Counter[str]:
        """Elements of activations per image for each kind of work."""
        found: Counter[str] = Counter()
        for each in self._all:
            if each.work == AFTER:
                found[BN] += each.elements
            if each.work is not None:
                found[each.work] += each.elements
            if each.readers == 1 and each.work == BEFORE:
                found[UNREAD] += each.elements
            if each.readers == 1 and each.work in {BN, AFTER} and each.averaged:
                found[MEAN] += each.elements
            further = (each.readers - 1) * each.elements
            if further > 0:
                made_by_bn = each.work in {BN, AFTER}
                place = AT_OUTPUT if made_by_bn else AT_INPUT if each.normalized else ELSEWHERE
                found[place] += further
        return found

    def _sum(self, result: Tensor, args: Any) -> None:
        summands = self._read(args)
        for each in summands:
            # The last kernel of this BatchNorm makes the sum, if nothing else reads its result.
            if each.work == BN and not each.rectified and each.readers == 1:
                each.work, each.readers = AFTER, 0
                self._is(result, each)
                return
        self._made(result, SUM)

    def _read(self, args: Any) -> list[_Activation]:
        tensors = [t for arg in args for t in (arg if isinstance(arg, list | tuple) else [arg])]
        found = [self._known[id(t)] for t in tensors if id(t) in self._known]
        for each in found:
            each.readers += 1
        return found

    def _made(self, result: Tensor, work: str | None) -> None:
        made = _Activation(work, result[0].numel())
        self._all.append(made)
        self._is(result, made)

    def _is(self, result: Tensor, activation: _Activation) -> None:
        self._kept.append(result)
        self._known[id(result)] = activation
