"""What the parts of a method offer each other, without their names.

A part states what it cannot work with, and which passes it adds, in these terms. So a part of
somebody else is counted and refused like one of ours.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple


@dataclass(frozen=True)
class Capabilities:
    """The parts of a method as the others see them.

    ``attacks``: x' differs from x. ``attacks_any_image``: the adversary can attack another image
    than the batch's. ``takes_start``: it begins where the start part says. ``begins_at_center``:
    its first gradient is taken at the centre of the ball. ``moves_center``: the ball is around
    another point than the image. ``chosen_start``: a start part says where the attack begins.
    ``keeps_starts``: the start part stores one perturbation per sample. ``gradient_steps`` is the
    number of steps along a gradient, ``attack_bn`` the mode of BatchNorm in them.
    ``counts_correct``: it reports ``Context.correct_share``. ``flat_attack_loss``: the attack's
    loss has no gradient at the centre of the ball. ``attack_loss_per_sample``: it has a value for
    each sample.

    ``fits``: the logits that the objective fits, "natural", "adversarial" or both, the first one
    first. ``objective_reads_center``: it compares f(x') with f(x). ``shares_gradient``: the
    attack's one gradient, of the cross entropy at the centre, serves the regularizer also
    (``Context.center_gradient``). ``labels`` is what the target takes as y, "classes" or "any".
    ``sample_state``: some part keeps a row per training sample. ``updates_per_batch`` is the number
    of updates of the weights for each batch. ``needs`` are the entries of ``NEEDS`` that parts ask
    for.
    """

    attacks: bool
    attacks_any_image: bool
    takes_start: bool
    begins_at_center: bool
    moves_center: bool
    chosen_start: bool
    keeps_starts: bool
    gradient_steps: int
    attack_bn: str
    counts_correct: bool
    flat_attack_loss: bool
    attack_loss_per_sample: bool
    fits: tuple[str, ...]
    objective_reads_center: bool
    shares_gradient: bool
    labels: str
    sample_state: bool
    updates_per_batch: int
    needs: frozenset[str]


class Conflict(NamedTuple):
    """A part of the slot ``slot`` (or "this method") that a part cannot work with, and the
    mathematical reason, which ends an error's sentence."""

    slot: str
    reason: str
