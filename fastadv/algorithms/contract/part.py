"""What all parts share: options, state, and the hooks of a run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import ClassVar

from torch import Tensor, nn

from fastadv.algorithms.contract.setup import Setup
from fastadv.algorithms.contract.tensors import Batch
from fastadv.declared import check_fields
from fastadv.engine.model.network import Network
from fastadv.errors import UserError
from fastadv.threat import Threat

NEEDS = frozenset(
    {
        "natural_logits_attack",  # logits of x in the attack's BN mode, before the attack
        "natural_logits_eval",  # logits of x with running BN statistics, before the attack
        "natural_logits_train",  # logits of the ball's centre in the outer pass, differentiable
        "teacher_logits",  # logits of the teachers on x_adv
        "second_view",  # another augmentation of the same images, attacked like the first
        "unlabelled_half",  # batches of which one half is pseudo-labelled
        "correct_at_each_step",  # at how many attack steps each sample was classified right
        "block_gradients",  # hooks at the inputs of the network's residual blocks
    }
)


@dataclass(eq=False)
class Part:
    """One part of a recipe; its dataclass fields are its options.

    The type of an option includes its range (``declared.py``). A part with a value outside it
    raises ``UserError`` when it is built. ``state`` holds the tensors of a checkpoint;
    ``rank_local_state`` are the names in it that differ between ranks.
    """

    rank_local_state: ClassVar[tuple[str, ...]] = ()

    setup: Setup = field(init=False, repr=False)
    net: Network = field(init=False, repr=False)
    state: dict[str, Tensor] = field(init=False, repr=False, default_factory=dict)
    active: bool = field(init=False, repr=False, default=True)  # only ``schedule`` changes it

    def __post_init__(self) -> None:
        check_fields(self, option_names(type(self)))

    def networks(self) -> Sequence[nn.Module]:
        """The networks that this part runs beside the user's (teachers)."""
        return ()

    def requires(self) -> frozenset[str]:
        """The entries of ``NEEDS`` that this part asks for; constant for given options."""
        return frozenset()

    def sample_state(self) -> tuple[str, ...]:
        """The names in ``state`` with one row per training sample; constant for given options."""
        return ()

    def refuses_accumulation(self) -> str | None:
        """Why the update of several calls (``update=False``) would not be that of their images in
        one call, as the second half of a sentence; None if it is. Constant for given options."""
        return None

    def follows_epochs(self) -> bool:
        """True if the part depends on the epoch (warm-ups, ramps)."""
        return False

    def depends_on(self) -> dict[str, str]:
        """Name -> digest of each input from outside that training depends on (teachers). Can be
        called before ``prepare``."""
        return {}

    def prepare(self, setup: Setup) -> None:
        """Take over the run and allocate the state; called before the first batch. Raises
        ``UserError`` if the run lacks something the part needs."""
        self.setup = setup
        self.net = setup.net

    def check_threat(self, threat: Threat) -> None:
        """Raise ``UserError`` for a ball in which the part cannot work."""

    def follow_threat(self, threat: Threat) -> None:
        """Called when the caller sets another ``threat``, which holds from the next update on."""
        self.setup = replace(self.setup, threat=threat)

    def follow_model(self) -> None:
        """Called when the model has other modules or parameters than at the last update."""

    def check_images(self, batch: Batch) -> None:
        """Raise ``UserError`` for images whose size does not fit the part's state."""

    def schedule(self, update: int, epoch: float) -> None:
        """Fill the 0-dim tensors that change with time, and set ``active``. Called before update
        number ``update`` (from 0); ``epoch`` is the position in the run, in epochs."""

    def renews(self, epoch: float) -> bool:
        """True if ``schedule`` would overwrite the per-sample state at ``epoch``."""
        return False

    def advice(self, update: int) -> str | None:
        """A warning for the user if the run looks wrong, otherwise None. It may wait for the
        device."""
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


def option_names(part: type[Part]) -> tuple[str, ...]:
    """The names of the options of a part class."""
    return tuple(entry.name for entry in fields(part) if entry.init)
