"""The tensors of one batch that the parts and the update hand to each other."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from torch import Tensor

if TYPE_CHECKING:
    from fastadv.data.view import View


class Batch(NamedTuple):
    """One batch as the parts see it; every tensor is on the model's device.

    ``x`` (B,C,H,W) in [0,1]; ``y`` (B,) int64; ``index`` (B,) int64 rows of the training set;
    ``offset`` 0-dim int64, the number of the draw, one an update; ``view`` the crop and flip that
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


class Context(NamedTuple):
    """What has been computed for one batch so far; None where no part asks for it.

    All are detached. B is the batch size, K the number of classes.
    """

    natural_logits_attack: Tensor | None = None  # (B,K) of x, in the attack's BatchNorm mode
    natural_logits_eval: Tensor | None = None  # (B,K) of x, with running statistics
    teacher_logits: Tensor | None = None  # (teachers,B,K) of x_adv
    soft_targets: Tensor | None = None  # (B,K) the distributions that the target compares with
    target_rows: Tensor | None = None  # (B,K) what the target will keep of these samples
    correct_steps: Tensor | None = None  # (B,) at how many steps a sample was classified right
    signs: tuple[Tensor, ...] = ()  # of the loss gradient: at the input, then entering each block
    start: Tensor | None = None  # (B,C,H,W) the perturbation that was begun with, as it is kept
    weakening: Tensor | None = None  # 0-dim or (B,C,H,W), factor of the perturbation trained on
    neighbor_adv: Tensor | None = None  # (B,C,H,W) the attacked second image of a regularizer


def required(value: Tensor | None) -> Tensor:
    """``value``, which a part's ``requires`` has asked for."""
    if value is None:
        raise RuntimeError("a part reads what it does not ask for in requires()")
    return value


class Adversarial(NamedTuple):
    """What an adversary hands over: ``x_adv`` and the ``center`` of its ball, both (B,C,H,W).

    ``context`` is the one it was given, with what it has found itself; ``start`` (B,C,H,W) is
    where its steps began, None where it takes none. All detached.
    """

    x_adv: Tensor
    center: Tensor
    context: Context
    start: Tensor | None = None


class Outputs(NamedTuple):
    """The logits of an outer pass, (B,classes) in float32 or wider.

    ``natural`` is None unless a part needs ``natural_logits_train``; ``context`` is everything
    found before the pass.
    """

    adversarial: Tensor
    natural: Tensor | None
    context: Context
