"""What single parts can do beside the hooks of their slot.

The update asks ``isinstance(part, Ability)``. A part has an ability by its methods alone: it does
not inherit from these classes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from fastadv.algorithms.contract.capabilities import Capabilities
from fastadv.algorithms.contract.tensors import Adversarial, Batch, Context
from fastadv.threat import Threat


@runtime_checkable
class BeginsAtCenter(Protocol):
    """An adversary, or a start, of which the first gradient may be taken at the centre of the
    ball."""

    @property
    def begins_at_center(self) -> bool: ...


@runtime_checkable
class MovesCenter(Protocol):
    """An adversary whose ball is around another point than the image."""

    moves_center: bool


@runtime_checkable
class Clipped(Protocol):
    """A start that may lie outside of the box. The first gradient is taken at the start clipped to
    the box; the first step leaves from the start itself."""

    clipped: bool


@runtime_checkable
class ForwardsCenter(Protocol):
    """A start that forwards the centre of the ball. If the attack's mode of BatchNorm is "train",
    this pass moves the statistics in place of the first pass of x in the outer loss."""

    forwards_center: bool


@runtime_checkable
class FlatAtCenter(Protocol):
    """An attack's loss whose gradient at the centre of the ball is zero: an attack needs a start
    elsewhere."""

    flat_at_center: bool


@runtime_checkable
class CountsCorrect(Protocol):
    """An adversary that reports ``Context.correct_share`` if a part needs
    ``correct_at_each_step``."""

    counts_correct: bool


@runtime_checkable
class LearnsSteps(Protocol):
    """An adversary whose x_adv is made again in the outer pass and differentiated there: in tensors
    of its own (learned step sizes), or in the weights alone."""

    def leaves(self) -> list[Tensor]:
        """The tensors beside the weights in which the outer pass is differentiated; there may be
        none."""

    def outer_input(
        self, batch: Batch, attacked: Adversarial, leaves: list[Tensor]
    ) -> tuple[Tensor, list[Tensor] | None]:
        """x_adv (B,C,H,W) and the noise of each block (None: no noise) in the outer pass,
        differentiable in ``leaves`` or in the weights."""


@runtime_checkable
class SharesForward(Protocol):
    """An adversary of one step whose forward pass at the centre may serve the outer pass also."""

    def shares_forward(self, method: Capabilities) -> bool:
        """True if the attack is a single step from the centre in BatchNorm's training mode."""

    def joint_center(self, batch: Batch) -> Tensor | None:
        """The centre (B,C,H,W) of the ball. None if the attack on this batch begins elsewhere,
        since the caller gave its start."""

    def joint_step(
        self, center: Tensor, logits: Tensor, batch: Batch, context: Context
    ) -> tuple[Tensor, Tensor]:
        """x_adv (B,C,H,W), one step from ``center``, which requires grad, and the gradient
        (B,C,H,W) that the step follows. The graph of ``logits`` (B,classes), those of ``center``,
        is kept for the outer pass."""


@runtime_checkable
class ReadsCenterGradient(Protocol):
    """A regularizer that needs the gradient of the cross entropy at the centre. Where the attack
    has just taken that step, it reads ``Context.center_gradient`` instead of another pass."""

    reads_center_gradient: bool


@runtime_checkable
class Replays(Protocol):
    """An adversary that updates the weights several times with each batch."""

    @property
    def updates_per_batch(self) -> int:
        """Updates of the weights per batch (Free-m: m)."""


@runtime_checkable
class FollowsThreat(Protocol):
    """A part whose state depends on the ball."""

    def follow_threat(self, threat: Threat) -> None:
        """Called when the caller sets another ``threat``, which holds from the next update on."""


@runtime_checkable
class RankLocal(Protocol):
    """A part with state that differs between processes; the names in ``state``."""

    rank_local_state: tuple[str, ...]


@runtime_checkable
class KeepsPlaces(Protocol):
    """A part with rank-local state whose rows belong to places in the batch; the names in
    ``state``. Other processes that go on with a run divide the rows anew."""

    places_in_batch: tuple[str, ...]


@runtime_checkable
class Renews(Protocol):
    """A part that may overwrite all of its per-sample state at once."""

    def renews(self, epoch: float) -> bool:
        """True if ``schedule`` would overwrite the per-sample state at ``epoch``."""


@runtime_checkable
class Reports(Protocol):
    """A part with numbers of its own for the metrics of a run, such as what it learns."""

    def report(self) -> Mapping[str, float | Tensor]:
        """Name -> present value, a number or a 0-dim tensor: at the end of an epoch it becomes
        "SLOT/NAME" in metrics.jsonl. The names are the same in every epoch."""


@runtime_checkable
class PerturbsBlocks(Protocol):
    """A part that asks for ``block_gradients``. ``block_noise_at`` is where the hooks are:
    "conv1" or "input" (``models/blocks.py``)."""

    block_noise_at: str


@runtime_checkable
class OrdersBatchNorm(Protocol):
    """An objective whose published code forwards x and x' in an order of its own."""

    def bn_updates(self) -> tuple[str, ...]:
        """The order in which x ("natural") and x' ("adversarial") update the statistics of
        BatchNorm in the published code. x and x' are each forwarded once; their momenta are chosen
        so that the statistics match this order."""


@runtime_checkable
class LogsPasses(Protocol):
    """An objective whose published code makes forward passes for its log alone. They move the
    statistics of BatchNorm and nothing else."""

    @property
    def logs_attacked(self) -> bool:
        """True if x' is forwarded once more at the end of the attack, in the attack's mode of
        BatchNorm."""

    @property
    def logs_clean(self) -> bool:
        """True if x is forwarded after the update, in training mode and at the new weights."""


@runtime_checkable
class WeighsKL(Protocol):
    """An objective with KL(f(x) || f(x')). An attack on that KL multiplies it by ``kl_weight``
    before it adds the target's penalty."""

    @property
    def kl_weight(self) -> float: ...


@runtime_checkable
class Penalizes(Protocol):
    """A target with a term of its own beside the loss."""

    def penalty(self, fitted: Tensor, adversarial: Tensor, context: Context) -> Tensor | None:
        """A per-sample term (B,) that is added to the outer loss and to the attack's, or None.

        ``fitted`` are the logits that the objective fits; both logits are (B,classes). In the
        attack both are those of the attacked image.
        """


@runtime_checkable
class Teaches(Protocol):
    """A part that runs networks beside the user's (teachers)."""

    def networks(self) -> Sequence[nn.Module]:
        """These networks."""

    def teach(self, x: Tensor) -> Tensor:
        """Their logits (teachers,B,classes) on images ``x`` (B,C,H,W), for the need
        ``teacher_logits``: x_adv, and the centre of the ball if the objective fits it."""

    def depends_on(self) -> dict[str, str]:
        """Name -> digest of each of them. Can be called before ``prepare``."""


@runtime_checkable
class HasNeighbor(Protocol):
    """A regularizer that compares the adversarial example with that of a second image."""

    def neighbor(self, batch: Batch) -> Tensor:
        """Images (B,C,H,W) that the same adversary attacks for ``Context.neighbor_adv``."""


@runtime_checkable
class Freezes(Protocol):
    """A layers part by which some parameters do not learn."""

    def learns(self, name: str) -> bool:
        """True if the parameter called ``name`` gets a gradient."""


@runtime_checkable
class SetsRates(Protocol):
    """A layers part that changes learning rates or gradients at every update."""

    def before_update(
        self, optimizer: torch.optim.Optimizer, names: list[str], gradients: list[Any]
    ) -> None:
        """Set learning rates, or replace entries of ``gradients``, before the optimizer step.
        ``names`` and ``gradients`` are in the same order; None is a parameter without gradient."""


@runtime_checkable
class NeedsHardLabels(Protocol):
    """A part that takes labels (B,) int64 and no soft ones (B,classes); why, in words."""

    hard_labels_only: str


@runtime_checkable
class GivenLoss(Protocol):
    """A part with a loss that the user gave as a function. It is checked with the first batch, and
    before a recording. ``given_as`` is the argument's name."""

    given_as: str

    def given_loss(self, logits: Tensor, y: Tensor) -> Tensor:
        """The loss of each sample (B,); logits and ``y`` are (B,...) of any shape."""
