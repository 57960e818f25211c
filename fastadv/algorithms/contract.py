"""What the parts of a recipe say to each other and to the step.

A training step walks through its parts in a fixed order (``training_step.py``). This page is the
whole contract: the tensors of a batch, what an adversary hands over, and one small base class a
slot. A part is a dataclass whose fields are its options; it reads what the run is from ``Setup``,
owns its state as preallocated tensors in ``self.state`` and changes them in place.

Invariants every part keeps, so that a step can be compiled and captured without a rewrite:

- no Python branch depends on the value of a tensor, and nothing waits for the device;
- what changes between updates (a ramp, a learned step size) is a 0-dim tensor filled in place,
  and a part that is not at work yet (a warm-up) says so by ``active``, which follows the epoch;
- every forward pass is ``self.net.logits``, every gradient comes from ``engine.gradient``, and
  what it is taken with respect to is a ``leaf`` made there;
- state is written only where ``ok`` is true.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal, NamedTuple

import torch
from torch import Tensor, nn

from fastadv.declared import NonNegative, Share, check_fields, option
from fastadv.engine.model.bn_momentum import ONCE
from fastadv.engine.model.network import Network
from fastadv.errors import UserError
from fastadv.threat import Threat

if TYPE_CHECKING:
    from fastadv.data.view import View

NEEDS = frozenset(
    {
        "natural_logits_attack",  # logits of x in the attack's BN mode, before the attack
        "natural_logits_eval",  # logits of x with running BN statistics, before the attack
        "natural_logits_train",  # logits of the ball's centre in the outer pass, differentiable
        "teacher_logits",  # logits of the teachers on x_adv
        "second_view",  # another augmentation of the same images, attacked like the first
        "unlabelled_half",  # batches half of pseudo-labelled images
        "correct_at_each_step",  # how many attack steps each sample was still classified right
        "block_gradients",  # the network's blocks can be tapped
    }
)


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


@dataclass(frozen=True)
class Setup:
    """What a run is, told to every part before the first batch, and anew where the caller sets
    another threat or a head with another number of classes.

    ``image_shape`` is (C,H,W); ``batch_size`` is the first batch's. ``total_steps`` counts updates;
    it and ``steps_per_epoch`` are None when the caller did not say. ``attack_steps`` is how many
    gradient steps the adversary takes, ``fits`` which logits the objective fits ("natural" or
    "adversarial").
    ``sound()`` is whether no update was bad so far (0-dim bool on the device): what changes a state
    outside of an update asks it.
    ``attack_loss(logits, y, context)`` is the scalar an adversary maximises: its own objective plus
    the target's term.
    """

    net: Network
    threat: Threat
    device: torch.device
    dtype: torch.dtype
    image_shape: tuple[int, int, int]
    batch_size: int
    num_samples: int | None
    num_classes: int
    total_steps: int | None
    steps_per_epoch: int | None
    seed: int
    needs: frozenset[str]
    attack_steps: int
    fits: str
    attack_loss: Callable[[Tensor, Tensor, Context], Tensor]
    sound: Callable[[], Tensor]

    @property
    def total_epochs(self) -> float | None:
        """How many epochs the run has, where both lengths are known."""
        if self.total_steps is None or not self.steps_per_epoch:
            return None
        return self.total_steps / self.steps_per_epoch


@dataclass(eq=False)
class Part:
    """One part of a recipe; its dataclass fields are its options.

    An option's hint says what it may be (``declared.py``), and a part cannot be made otherwise.
    """

    rank_local_state: ClassVar[tuple[str, ...]] = ()  # names in ``state`` that differ by rank
    accumulates: ClassVar[bool] = True

    setup: Setup = field(init=False, repr=False)
    net: Network = field(init=False, repr=False)
    state: dict[str, Tensor] = field(init=False, repr=False, default_factory=dict)
    active: bool = field(init=False, repr=False, default=True)  # changed by ``schedule`` only

    def __post_init__(self) -> None:
        check_fields(self, option_names(type(self)))

    def networks(self) -> Sequence[nn.Module]:
        """Networks beside the user's that this part runs (teachers)."""
        return ()

    def requires(self) -> frozenset[str]:
        """The entries of ``NEEDS`` that this part asks for with its options; constant."""
        return frozenset()

    def sample_state(self) -> tuple[str, ...]:
        """The names in ``state`` that hold one row per training sample; constant."""
        return ()

    def follows_epochs(self) -> bool:
        """True if the part must be told the epoch (warm-ups, ramps)."""
        return False

    def depends_on(self) -> dict[str, str]:
        """A digest of each thing from outside that it learns from; also before ``prepare``."""
        return {}

    def prepare(self, setup: Setup) -> None:
        """Learn the run and allocate the state; called once, before the first batch."""
        self.setup = setup
        self.net = setup.net

    def check_threat(self, threat: Threat) -> None:
        """Raise ``UserError`` for a ball the part cannot work in."""

    def follow_threat(self, threat: Threat) -> None:
        """The caller trains against ``threat`` from the next update on."""
        self.setup = replace(self.setup, threat=threat)

    def follow_model(self) -> None:
        """The model has been given other modules or parameters since the last update."""

    def check_images(self, batch: Batch) -> None:
        """Raise ``UserError`` for images whose size is not that of what the part remembers."""

    def schedule(self, update: int, epoch: float) -> None:
        """Fill the 0-dim tensors that change with time, before update ``update`` (from 0)."""

    def renews(self, epoch: float) -> bool:
        """Whether ``schedule`` would now change what is kept of every sample."""
        return False

    def advice(self, update: int) -> str | None:
        """A sentence for the user when the run looks wrong; may wait for the device."""
        return None

    def load_state(self, saved: Mapping[str, Tensor]) -> None:
        """Take over a saved ``state``, in place; shapes must agree."""
        for name, tensor in self.state.items():
            if saved[name].shape != tensor.shape:
                raise UserError(
                    f"The saved {name} has shape {tuple(saved[name].shape)}, this run's "
                    f"{tuple(tensor.shape)}: another data set or model."
                )
            tensor.copy_(saved[name])


def option_names(part: type[Part]) -> tuple[str, ...]:
    """The names of a part's options."""
    return tuple(entry.name for entry in fields(part) if entry.init)


@dataclass(eq=False)
class Adversary(Part):
    """Makes x_adv from x. ``attack_objective`` is ``"ce"`` or ``"kl"`` (KL to natural logits).

    ``shrink`` and ``flip_signs`` weaken the perturbation that is trained on, whatever made it:
    the part of its length, and of its elements' signs, that is taken away (AdvLC, Fig. 4).
    """

    wants_input_gradient: ClassVar[bool] = False
    attack_objective: Literal["ce", "kl"] = option(
        "ce", "what the attack climbs: cross entropy or KL to the natural prediction"
    )
    attack_bn: Literal["train", "eval"] = option("train", "mode of BatchNorm during the attack")
    shrink: Share = option(
        0.0, "share of the perturbation's length that is taken away before training on it"
    )
    flip_signs: Share = option(
        0.0, "share of the perturbation's elements whose sign is flipped before training on it"
    )

    @property
    def updates_per_batch(self) -> int:
        """How many times one batch updates the weights (Free-m: m)."""
        return 1

    def make(self, batch: Batch, context: Context) -> Adversarial:
        raise NotImplementedError

    def unmoved(self, attacked: Adversarial) -> Tensor | None:
        """Which images (B,) the attack did not move although it may: their gradient was zero. None
        where it takes no steps beside the outer pass."""
        if attacked.start is None or not self.setup.threat.eps:
            return None
        # Some published starts are not cut to the box; the first step does that.
        start = attacked.start.clamp(self.setup.threat.low, self.setup.threat.high)
        same = (attacked.x_adv == start).flatten(1).all(1)
        if self.net.syncs_are_free and not same.any():
            return same
        # In a corner of the ball (where ATTA's memory ends) a gradient may point outside only.
        return same & ~self.setup.threat.at_edge(start, attacked.center)

    def joint_center(self, batch: Batch) -> Tensor | None:
        """The centre of the ball, where a single step begins there and in training mode: one
        forward pass then serves the attack and the outer pass. None where it cannot."""
        return None

    def joint_step(self, center: Tensor, logits: Tensor, y: Tensor, context: Context) -> Tensor:
        """x_adv, one step from ``center`` (requires grad), whose ``logits`` keep their graph."""
        raise NotImplementedError

    def leaves(self) -> list[Tensor]:
        """Tensors the outer backward differentiates beside the weights (APART's step sizes)."""
        return []

    def outer_input(
        self, batch: Batch, attacked: Adversarial, leaves: list[Tensor]
    ) -> tuple[Tensor, list[Tensor] | None]:
        """x_adv and the block noise of the outer pass, differentiable in ``leaves``."""
        return attacked.x_adv, None

    def after(
        self,
        batch: Batch,
        attacked: Adversarial,
        leaf_gradients: list[Tensor],
        input_gradient: Tensor | None,
        ok: Tensor,
    ) -> None:
        """Update the state from the outer pass's gradients, only where ``ok`` (0-dim bool)."""


@dataclass(eq=False)
class Target(Part):
    """Which label is fitted."""

    def is_plain(self) -> bool:
        """Whether it is exactly the cross entropy with the given label."""
        return False

    def prepare_batch(self, batch: Batch, context: Context) -> Context:
        """``context`` with this batch's targets; called before the attack."""
        return context

    def teach(self, x_adv: Tensor) -> Tensor:
        """Teachers' logits (teachers,B,classes) on ``x_adv``: the need ``teacher_logits``."""
        raise NotImplementedError

    def attack_term(self, logits: Tensor, context: Context) -> Tensor | None:
        """A per-sample term (B,) of the attack's objective."""
        return None

    def fit(self, logits: Tensor, y: Tensor, context: Context) -> Tensor:
        """Per-sample loss (B,) of ``logits`` against the target."""
        raise NotImplementedError

    def penalty(self, fitted: Tensor, adversarial: Tensor, context: Context) -> Tensor | None:
        """A per-sample term (B,) of the outer loss; ``fitted``: the logits the objective fits."""
        return None

    def after(self, batch: Batch, outputs: Outputs, ok: Tensor) -> None:
        """Update the state, only where ``ok``."""


Fit = Callable[[Tensor, Tensor, Context], Tensor]


@dataclass(eq=False)
class Objective(Part):
    """The outer loss, one value a sample; the weights part maximises the same function."""

    fits: ClassVar[str] = "adversarial"

    def is_plain(self) -> bool:
        """Whether it is exactly what the target fits on f(x')."""
        return False

    def passes(self) -> tuple[str, ...]:
        """The published code's training passes of x ("natural") and x' ("adversarial"), by which
        BatchNorm's statistics move; the activations need one of each."""
        return ONCE

    def attack_scale(self) -> float:
        """The factor of KL(f(x) || f(x')) in the loss, where an attack adds a term to that KL."""
        return 1.0

    def per_sample(self, outputs: Outputs, y: Tensor, fit: Fit) -> Tensor:
        """The loss (B,) of one pass; ``fit`` is the target's."""
        raise NotImplementedError


@dataclass(eq=False)
class Regularizer(Part):
    """What is added to the mean of the objective, times ``reg_weight``.

    ``reg_ramp``: the weight rises with the epoch e (from 0) as reg_weight (e + 1)/epochs.
    """

    wants_center_gradient: ClassVar[bool] = False  # ``attacked.center`` requires grad in ``term``
    wants_adversarial_gradient: ClassVar[bool] = False  # so does ``x_adv``
    wants_neighbor: ClassVar[bool] = False  # ``neighbor`` gives images to be attacked too

    reg_weight: NonNegative = option(1.0, "weight of the regularizer in the loss")
    reg_ramp: bool = option(False, "let the weight of the regularizer rise linearly over the run")

    def follows_epochs(self) -> bool:
        return self.reg_ramp

    def prepare(self, setup: Setup) -> None:
        super().prepare(setup)
        self._ramp = torch.zeros((), device=setup.device, dtype=setup.dtype)
        if self.reg_ramp and setup.total_epochs is None:
            raise UserError("reg_ramp follows the run: pass total_steps= and steps_per_epoch=.")

    def schedule(self, update: int, epoch: float) -> None:
        if self.reg_ramp and self.setup.total_epochs is not None:
            share = (int(epoch) + 1) / self.setup.total_epochs
            self._ramp.fill_(self.reg_weight * min(share, 1.0))

    def weight(self) -> float | Tensor:
        """What ``term`` is multiplied by in this update."""
        return self._ramp if self.reg_ramp else self.reg_weight

    def neighbor(self, batch: Batch) -> Tensor:
        """Images (B,C,H,W) that the same adversary attacks for ``Context.neighbor_adv``."""
        raise NotImplementedError

    def term(self, batch: Batch, attacked: Adversarial, x_adv: Tensor, outputs: Outputs) -> Tensor:
        """A scalar, differentiable in the weights."""
        raise NotImplementedError


class Losses(NamedTuple):
    """Per-sample losses (B,) at the weights of the moment: the whole objective, and plain
    adversarial cross entropy. ``plain`` says that the two are the same, the cross entropy of
    ``logits`` (B,classes) with ``y`` (B,)."""

    total: Tensor
    adversarial: Tensor
    logits: Tensor
    y: Tensor
    plain: bool


WeightGradient = Callable[[], tuple[list[Tensor], Tensor]]


@dataclass(eq=False)
class WeightPerturbation(Part):
    """Moves the weights to a worse place for the outer pass."""

    accumulates: ClassVar[bool] = False

    def select(self, names: Sequence[str], tensors: Sequence[Tensor]) -> list[int]:
        """Which parameters are perturbed: positions in ``tensors``."""
        raise NotImplementedError

    def reduce(self, losses: Losses) -> tuple[Tensor, Tensor]:
        """The scalar whose gradient is the direction, and the 0-dim count of samples in it."""
        raise NotImplementedError

    def perturb(self, weights: list[Tensor], gradient: WeightGradient) -> None:
        """Move ``weights`` in place. ``gradient()`` gives the gradients of ``reduce`` at the
        present weights, one a tensor of ``weights``, and its count."""
        raise NotImplementedError

    def restore(self, weights: list[Tensor]) -> None:
        """Take the perturbation back, keeping what the optimizer did."""
        raise NotImplementedError


@dataclass(eq=False)
class Layers(Part):
    """Which layers learn, and at which rate."""

    def optimizer_groups(self, model: nn.Module, lr: float) -> list[dict[str, Any]]:
        """The optimizer's parameter groups: every parameter of ``model`` exactly once."""
        return [{"params": list(model.parameters()), "lr": lr}]

    def bind(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        """Learn the model; raise ``UserError`` unless ``optimizer`` has ``optimizer_groups``."""

    def learns(self, name: str) -> bool:
        """Whether the parameter called ``name`` gets a gradient."""
        return True

    def before_update(
        self, optimizer: torch.optim.Optimizer, names: list[str], gradients: list[Tensor | None]
    ) -> None:
        """Set rates, or scale gradients in place, just before the optimizer steps."""


@dataclass(eq=False)
class Averaging(Part):
    """Which weights are evaluated.

    All of a model's parameters are averaged, by name: a frozen one's average is that of a constant,
    and it may learn later. In ``parameters`` they are as they stand in the model now.
    """

    def start(self, parameters: Mapping[str, Tensor]) -> None:
        """Allocate the average."""

    def update(self, parameters: Mapping[str, Tensor], ok: Tensor) -> None:
        """After every optimizer step."""

    def epoch_end(self, epoch: int, parameters: Mapping[str, Tensor], ok: Tensor) -> None:
        """After the last update of ``epoch`` (from 0)."""

    def replaced(self, parameters: Mapping[str, Tensor], old: Mapping[str, str]) -> None:
        """Other parameters stand in the model: ``old`` says by which name one was known before.
        One that was not there has no average yet; those that are gone lose theirs."""

    def averaged(self) -> dict[str, Tensor]:
        """The averaged parameters by name; the live ones are evaluated for those missing."""
        return {}

    def average(self) -> list[Tensor] | None:
        """The averaged parameters, or None while the live ones are to be evaluated."""
        return [*self.averaged().values()] or None
