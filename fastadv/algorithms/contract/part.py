"""What all parts share: options, state, and the hooks of a run."""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Iterable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar, dataclass_transform, final

from torch import Tensor

from fastadv import kernels
from fastadv.algorithms.contract.capabilities import Capabilities, Conflict
from fastadv.algorithms.contract.passes import Pass
from fastadv.algorithms.contract.setup import Setup
from fastadv.algorithms.contract.tensors import Batch, Outcome
from fastadv.declared import check_fields
from fastadv.engine.model.network import Network
from fastadv.engine.noise import Stream
from fastadv.errors import UserError
from fastadv.threat import Threat

NEEDS = frozenset(
    {
        "natural_logits_attack",  # logits of x in the attack's BN mode, before the attack
        "natural_logits_eval",  # logits of x with running BN statistics, before the attack
        "natural_logits_first",  # logits of x in BN's training mode, before the attack
        "natural_logits_train",  # logits of the ball's centre in the outer pass, differentiable
        "class_logits",  # logits (B,classes) and labels of classes, whatever the target takes
        "teacher_logits",  # logits of the teachers on the images that are fitted
        "second_view",  # another augmentation of the same images, attacked like the first
        "unlabelled_half",  # batches of which one half is pseudo-labelled
        "correct_at_each_step",  # at how many attack steps each sample was classified right
        "block_gradients",  # hooks at the inputs of the network's residual blocks
        "input_gradient",  # the outer pass's gradient at x_adv, in ``after``
        "start_gradient",  # the outer pass's gradient at the attack's start, in ``after``
        "differentiable_center",  # ``attacked.center`` requires grad in a regularizer's ``term``
        "differentiable_input",  # ``x_adv`` requires grad in a regularizer's ``term``
    }
)


@dataclass_transform(eq_default=False, field_specifiers=(field,))
@dataclass(eq=False)
class Part:
    """One part of a method. Every subclass is a dataclass by itself; its fields are its options.

    The type of an option includes its range (``declared.py``). A part with a value outside it
    raises ``UserError`` when it is built. ``on_data`` are the options that the part takes on one
    data set, whichever method it stands in: kind of data set -> options.

    ``suspects`` are the options whose size usually is the cause when a loss stops being finite.

    ``setup`` and ``net`` are there from ``prepare`` on. ``state`` holds the tensors of a checkpoint
    by name. ``active`` is False while the part has not begun (a warm-up): the step then makes no
    pass before the attack for it and calls no weights part; all else a part leaves out by itself.
    """

    on_data: ClassVar[Mapping[str, Mapping[str, Any]]] = {}
    suspects: ClassVar[tuple[str, ...]] = ()

    setup: Setup = field(init=False, repr=False)
    net: Network = field(init=False, repr=False)
    state: dict[str, Tensor] = field(init=False, repr=False, default_factory=dict)
    in_step: bool = field(init=False, repr=False, default=False)  # it keeps the state of a step
    active: bool = field(init=False, repr=False, default=True)  # only ``schedule`` changes it

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        dataclass(eq=False)(cls)

    def __post_init__(self) -> None:
        check_fields(self, option_names(type(self)))

    def requires(self) -> frozenset[str]:
        """The entries of ``NEEDS`` that this part asks for; constant for given options."""
        return frozenset()

    def sample_state(self) -> tuple[str, ...]:
        """The names in ``state`` with one row per training sample, the first dimension; constant
        for given options. With several processes each row goes to all of them after an update."""
        return ()

    def refuses_accumulation(self) -> str | None:
        """Why the update of several calls (``update=False``) would not be that of their images in
        one call, as the second half of a sentence; None if it is. Constant for given options."""
        return None

    def follows_epochs(self) -> bool:
        """True if the part depends on the epoch (warm-ups, ramps). The first call of the step then
        raises ``UserError`` unless the caller says the epoch or its length."""
        return False

    def is_plain(self) -> bool:
        """True if the part adds nothing of its own: the cross entropy on x', the given label."""
        return False

    def conflicts(self, method: Capabilities) -> Iterable[Conflict]:
        """Why the part cannot stand beside the others of ``method``; nothing if it can."""
        return ()

    def extra_passes(self, method: Capabilities) -> Counter[Pass]:
        """The passes over the images of one batch that this part adds to an update: to one
        training pass over x_adv, and one over the ball's centre if a part asks for
        ``natural_logits_train``. A part that turns one of these into another kind subtracts the
        one and adds the other."""
        return Counter()

    def prepare(self, setup: Setup) -> None:
        """Take over the run and allocate the state; called once, before the first update or before
        a state is loaded. Raises ``UserError`` if the run lacks something the part needs."""
        self.setup = setup
        self.net = setup.net

    def check_threat(self, threat: Threat) -> None:
        """Raise ``UserError`` for a ball in which the part cannot work; called when the step is
        built, and for each new ``threat`` that the caller sets."""

    def follow_model(self) -> None:
        """Called before an update if the model or the optimizer has other modules, parameters or
        groups than at the last one."""

    def sized(self) -> bool:
        """True if the state of a part that defines ``check_images`` fits images of one size with
        the options as they are; constant."""
        return True

    def check_images(self, batch: Batch) -> None:
        """Raise ``UserError`` for images whose size does not fit the part's state; called with each
        batch, before its attack, if the part is ``sized``."""

    def schedule(self, update: int, epoch: float) -> None:
        """Fill the 0-dim tensors that change with time, and set ``active``. Called before update
        number ``update`` (from 0); ``epoch`` is the position in the run, in epochs."""

    def phase(self) -> Hashable:
        """What ``schedule`` has decided beside the values of tensors. A captured update is recorded
        for each value, so it may change with the epoch only."""
        return self.active

    def after(self, outcome: Outcome, ok: Tensor) -> None:
        """Update the state after the optimizer's step, only where ``ok`` (0-dim bool): after an
        update that is not finite it is false, and all stays as it was."""

    def advice(self, update: int) -> str | None:
        """A warning for the user if the run looks wrong after ``update`` updates, otherwise None.
        It may wait for the device."""
        return None

    def load_state(self, saved: Mapping[str, Tensor]) -> None:
        """Copy a saved ``state`` into this one. Raises ``UserError`` for other shapes."""
        for name, tensor in self.state.items():
            if saved[name].shape != tensor.shape:
                raise UserError(
                    f"The saved {name} has shape {tuple(saved[name].shape)}, this run's "
                    f"{tuple(tensor.shape)}: another data set or model."
                )
            tensor.copy_(saved[name])

    # -- for the parts ------------------------------------------------------------------------

    @final
    def uniform(self, batch: Batch, stream: Stream, shape: tuple[int, ...] | None = None) -> Tensor:
        """Noise (B,*shape), uniform in [-1,1): the same for a sample and update in every mode.
        ``shape`` is by default that of an image; (1,) draws one number per sample."""
        return self._noise(kernels.noise_uniform, batch, stream, shape)

    @final
    def normal(self, batch: Batch, stream: Stream, shape: tuple[int, ...] | None = None) -> Tensor:
        """Noise (B,*shape) from N(0,1), drawn like ``uniform``."""
        return self._noise(kernels.noise_normal, batch, stream, shape)

    def _noise(
        self, draw: Any, batch: Batch, stream: Stream, shape: tuple[int, ...] | None
    ) -> Tensor:
        shape, dtype = tuple(batch.x.shape[1:]) if shape is None else shape, batch.x.dtype
        offset = batch.offset if not stream.shift else batch.offset + stream.shift
        drawn: Tensor = draw(batch.index, shape, self.setup.seed, offset, stream.number, dtype)
        return drawn


def option_names(part: type[Part]) -> tuple[str, ...]:
    """The names of the options of a part class."""
    return tuple(entry.name for entry in fields(part) if entry.init)
