"""The tensors of one batch that the parts and the update hand to each other."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from torch import Tensor

if TYPE_CHECKING:
    from fastadv.data.view import View


class Batch(NamedTuple):
    """One batch as the parts see it; every tensor is on the model's device.

    ``x`` (B,C,H,W) in [0,1]; ``y`` (B,) int64; ``index`` (B,) int64 rows of the training set;
    ``offset`` 0-dim int64, the number of the draw, one per update; ``view`` the crop and flip that
    made ``x``; ``start`` (B,C,H,W) an initial perturbation given by the caller; ``second`` another
    view of the same images where a part needs one.
    """

    x: Tensor
    y: Tensor
    index: Tensor  # type: ignore[assignment]  # tuple.index is not used on a batch
    offset: Tensor
    view: View | None = None
    start: Tensor | None = None
    second: Tensor | None = None


class Intermediates(NamedTuple):
    """What is computed for a batch before the outer pass, all detached; None where no part of the
    recipe computes it. A part adds its own with ``_replace``.
    """

    natural_logits_attack: Tensor | None = None
    """(B,classes): f(x) in the attack's BatchNorm mode."""
    natural_logits_eval: Tensor | None = None
    """(B,classes): f(x) with running BatchNorm statistics."""
    teacher_logits: Tensor | None = None
    """(teachers,B,classes): the teachers at the images that are trained on."""
    soft_labels: Tensor | None = None
    """(B,classes): the probabilities that a target with a memory fits."""
    updated_rows: Tensor | None = None
    """(B,classes): what that target writes to its memory where the update counts."""
    correct_at_each_step: Tensor | None = None
    """(B,) int64: the number of attack steps before which a sample was classified right."""
    perturbation_factor: Tensor | None = None
    """0-dim or (B,C,H,W): what x_adv - center is multiplied by before the outer pass."""
    stored_perturbation: Tensor | None = None
    """(B,C,H,W): the windows of the adversary's memory, as they were before this update."""
    input_sign: Tensor | None = None
    """(B,C,H,W): the sign of the loss gradient at the point where the attack begins."""
    block_signs: tuple[Tensor, ...] = ()
    """The same at the input of each residual block that is attacked."""
    neighbor_adv: Tensor | None = None
    """(B,C,H,W): the adversarial example of a regularizer's second image."""


class Adversarial(NamedTuple):
    """What an adversary hands over: ``x_adv`` and the ``center`` of its ball, both (B,C,H,W).

    ``intermediates`` are those it was given and its own; ``start`` (B,C,H,W) is where its steps
    began, None where it takes none. All detached.
    """

    x_adv: Tensor
    center: Tensor
    intermediates: Intermediates
    start: Tensor | None = None


class Outputs(NamedTuple):
    """The logits of an outer pass, (B,classes) in float32 or wider.

    ``natural`` is None unless a part needs ``natural_logits_train``; ``intermediates`` is all that
    was computed before the pass.
    """

    adversarial: Tensor
    natural: Tensor | None
    intermediates: Intermediates


class Gradients(NamedTuple):
    """The gradients of the outer loss, in the shapes and types of what it is differentiated in;
    None where the loss does not depend on that.

    ``weights``: of the trainable parameters, in the model's order. ``leaves``: of the adversary's
    leaves. ``x_adv`` (B,C,H,W): of the adversarial images, where the adversary asks for it.
    """

    weights: list[Tensor | None]
    leaves: list[Tensor | None]
    x_adv: Tensor | None


def computed(tensor: Tensor | None, name: str) -> Tensor:
    """``tensor``; a RuntimeError where it is None, for a part that reads what it does not
    require."""
    if tensor is None:
        raise RuntimeError(f"{name} was not computed: a part reads it and does not require it")
    return tensor
