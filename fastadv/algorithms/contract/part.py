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
        "unlabelled_half",  # batches half of pseudo-labelled images
        "correct_at_each_step",  # how many attack steps each sample was still classified right
        "block_gradients",  # the network's blocks can be tapped
    }
)


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
