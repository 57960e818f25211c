"""The tensors of one batch that the parts and the update exchange."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from torch import Tensor

from fastadv.threat import Threat

if TYPE_CHECKING:
    from fastadv.data.view import View


class Batch(NamedTuple):
    """One batch as the parts see it; every tensor is on the model's device.

    ``x`` (B,C,H,W) in the box of ``threat``; ``y`` the labels, (B,) int64 or what else
    ``Target.labels`` allows; ``index`` (B,) int64 rows of the training set; ``offset`` 0-dim int64,
    the number of the random draw, one per update; ``threat`` the perturbations that are allowed in
    this batch; ``view`` the crop and flip that made ``x``, None for images that are not augmented;
    ``start`` (B,C,H,W) an initial perturbation in pixels, from the caller; ``second`` (B,C,H,W)
    another view of the same images, in a call that has one; ``alpha`` (B,) the step of each image
    in pixels, from the caller; ``targets``, like ``y``, the labels that a targeted attack wants to
    reach.
    """

    x: Tensor
    y: Tensor
    index: Tensor  # type: ignore[assignment]  # tuple.index is not used on a batch
    offset: Tensor
    threat: Threat
    view: View | None = None
    start: Tensor | None = None
    second: Tensor | None = None
    alpha: Tensor | None = None
    targets: Tensor | None = None

    @property
    def attacked_y(self) -> Tensor:
        """The labels of the attack's loss: ``targets`` of a targeted attack, otherwise ``y``."""
        return self.y if self.targets is None else self.targets


class Context(NamedTuple):
    """The intermediate results of one batch; an entry is None if no part asks for it.

    All tensors are detached. B is the batch size, K the number of classes.
    """

    natural_logits_attack: Tensor | None = None  # (B,K) of x, in the attack's BatchNorm mode
    natural_logits_eval: Tensor | None = None  # (B,K) of x, with running statistics
    natural_logits_first: Tensor | None = None  # (B,K) of x, in training mode, before the attack
    teacher_logits: Tensor | None = None  # (teachers,B,K) of the image that is fitted first
    natural_teacher_logits: Tensor | None = None  # (teachers,B,K) of the centre, if x is fitted
    soft_targets: Tensor | None = None  # (B,K) the distributions that the target compares with
    attack_targets: Tensor | None = None  # (B,K) those of the attack, if they are others
    target_rows: Tensor | None = None  # (B,K) the target's new state of these samples
    correct_share: Tensor | None = None  # (B,) of the steps before which it was classified right
    signs: tuple[Tensor, ...] = ()  # of the loss gradient: at the input, then entering each block
    start: Tensor | None = None  # (B,C,H,W) the initial perturbation in the units of its state
    weakening: Tensor | None = None  # 0-dim or (B,C,H,W), factor of the perturbation trained on
    center_gradient: Tensor | None = None  # (B,C,H,W) that the step from the centre followed
    neighbor_adv: Tensor | None = None  # (B,C,H,W) the attacked second image of a regularizer
    own: tuple[Tensor, ...] = ()  # what the adversary keeps from ``make`` for ``after``


def required(value: Tensor | None) -> Tensor:
    """``value``, which a part asked for in ``requires``; raises ``RuntimeError`` if it is None."""
    if value is None:
        raise RuntimeError("a part reads what it does not ask for in requires()")
    return value


class Adversarial(NamedTuple):
    """The result of an attack: ``x_adv`` and the ``center`` of its ball, both (B,C,H,W).

    ``context`` is the given one with the adversary's own entries added. ``start`` (B,C,H,W) is the
    point at which its steps began, or None if it takes none; ``stepped`` (B,C,H,W) the one at which
    they ended, None if that is ``x_adv``. All tensors are detached.
    """

    x_adv: Tensor
    center: Tensor
    context: Context
    start: Tensor | None = None
    stepped: Tensor | None = None


class Outputs(NamedTuple):
    """The logits of an outer pass, (B,classes) in float32 or wider; of any shape (B,...) if the
    target takes any labels.

    ``adversarial`` are those of x_adv. ``natural`` are those of the ball's centre, None unless a
    part needs ``natural_logits_train``. ``context`` holds the intermediate results from before the
    pass.
    """

    adversarial: Tensor
    natural: Tensor | None
    context: Context

    @property
    def natural_context(self) -> Context:
        """``context`` for a fit of ``natural`` by an objective that fits ``adversarial`` also: with
        what teachers say of the ball's centre."""
        context = self.context
        return context._replace(teacher_logits=context.natural_teacher_logits)


class Outcome(NamedTuple):
    """What every part sees after the outer pass, in ``after``. All tensors are detached.

    ``leaf_gradients`` are those of ``LearnsSteps.leaves``. ``input_gradient`` (B,C,H,W) is the one
    of x_adv, or of the attack's start, whichever a part asks for; None without, or if the loss does
    not depend on it. ``term`` (0-dim) is the regularizer's ``term``, the mean of all processes;
    None without a regularizer.
    """

    batch: Batch
    attacked: Adversarial
    outputs: Outputs
    leaf_gradients: list[Tensor]
    input_gradient: Tensor | None
    term: Tensor | None
