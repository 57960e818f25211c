"""Counts of an evaluation, and the warnings that follow from them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from fastadv.errors import UserError
from fastadv.evaluation.scores import Scores
from fastadv.evaluation.search.catalogue import REPEATS, SECOND_OPINION, is_cascade

MASKED_SHARE = 0.01  # of the images; below it there is no warning
SQUARE_SHARE = 0.002  # as in the released AutoAttack


@dataclass(frozen=True)
class Counts:
    """The counts of an evaluation over its first ``images``, as plain numbers.

    Lists with one entry per attack: ``right``, images classified correctly; ``zero_gradient``,
    those of them whose gradient was exactly zero at a starting point; ``saturated``, those whose
    loss was exactly zero after the attack; ``by_square``, those that fell to a Square attack after
    all other attacks of a cascade. ``masks``, from the first batch: the outputs are probabilities;
    the outputs change from call to call.
    """

    attacks: list[str]
    images: int
    right: list[int]
    zero_gradient: list[int]
    saturated: list[int]
    by_square: list[int]
    masks: list[bool]

    def scores(self) -> Scores:
        """Accuracy in [0,1] by attack; raises ``UserError`` if there are no images."""
        if self.images == 0:
            raise UserError("There are no images to evaluate: the batches are empty.")
        shares = (torch.tensor(self.right) / self.images).tolist()
        return Scores(dict(zip(self.attacks, shares, strict=True)), self.images)

    def remarks(self) -> Iterator[str]:
        """Warnings about gradient masking, which makes the reported accuracy too high."""
        n = self.images
        counted = zip(self.attacks, self.zero_gradient, self.saturated, self.by_square, strict=True)
        for name, flat, saturated, by_square in counted:
            if flat >= max(1.0, MASKED_SHARE * n):
                some = " of a search" if is_cascade(name) else ""
                yield (
                    f"{name}: the gradient{some} was exactly zero for {flat} of {n} images "
                    f"({100 * flat / n:.0f} %) that were classified correctly; the network masks "
                    f"its gradient (rounding, saturation), and {_meaning(name)}."
                )
            elif saturated >= max(1.0, MASKED_SHARE * n):
                yield (
                    f"{name}: after the attack the loss was exactly zero for {saturated} of {n} "
                    f"images ({100 * saturated / n:.0f} %); the softmax is saturated and masks "
                    "the gradient: evaluate with cw, cw-margin or autoattack."
                )
            if by_square > SQUARE_SHARE * n:
                yield (
                    f"{name}: Square, which sees no gradient, fooled the network on {by_square} of "
                    f"{n} images ({100 * by_square / n:.1f} %) that all attacks with gradients had "
                    "left; the gradients mislead, and this accuracy is too high: attack with more "
                    "queries (square-20000), or with an attack made for this network."
                )
        probabilities, changes = self.masks or (False, False)
        if probabilities:
            yield (
                "The model returns probabilities, not logits: its gradient vanishes where it is "
                "confident, and the accuracy under attack is too high; remove the softmax or "
                "sigmoid."
            )
        followed = [name for name in self.attacks if name != "clean"] or self.attacks
        if changes and not all(name in REPEATS for name in followed):
            yield (
                "The model's outputs change from call to call in eval mode: an attack follows "
                "noise, and the accuracy is too high; evaluate with its noise switched off, or "
                "with autoattack-rand."
            )


def _meaning(name: str) -> str:
    """What a gradient of zero means for the accuracy under ``name``, and the way out."""
    if is_cascade(name):  # its other searches may have had a gradient
        return (
            "this accuracy may be too high: check the network with fastadv evaluate --sanity "
            "(fastadv.sanity)"
        )
    return "this accuracy means nothing: evaluate with cw, cw-margin or autoattack"


def by_square(stages: Sequence[str], fooled_by: np.ndarray) -> int:
    """The number of images that fell to Square, if that is the last of several attacks, apart from
    ``SECOND_OPINION``; ``stages``: "clean" and the attacks of a cascade; ``fooled_by`` (N,): the
    stage that fooled an image."""
    last = len(stages) - 1
    while last > 0 and stages[last] in SECOND_OPINION:
        last -= 1
    if last < 2 or not (stages[last] == "square" or stages[last].startswith("square-")):
        return 0
    return int((fooled_by == last).sum())
