"""A perturbation of each training sample, kept from epoch to epoch and sometimes begun anew."""

from __future__ import annotations

from dataclasses import field
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from fastadv.algorithms.contract import Batch, Part, Setup
from fastadv.algorithms.sample_state import SampleStore
from fastadv.declared import CountOrZero, option
from fastadv.engine.noise import Stream

if TYPE_CHECKING:
    from fastadv.data.view import View


class StoredPerturbations(Part):
    """A part whose state is one perturbation per sample, in the padded image.

    Perturbations are read and written back through the crop and flip that made x (``window``);
    pixels outside of the window keep their values. A subclass states by ``renew`` how they begin,
    and writes them in ``after``. With ``reset_every`` 0 they never begin anew; otherwise the step
    must know the epoch.
    """

    reset_every: CountOrZero = option(
        10, "epochs after which the stored perturbations start anew; 0: never"
    )
    pad: CountOrZero = option(4, "largest shift of the random crops in pixels, as the run's")

    store: SampleStore = field(init=False, repr=False)

    def renew(self, draw: int, ok: Tensor | None = None) -> None:
        """Overwrite all perturbations; ``draw`` is the number of the draw, from 0. If ``ok`` (0-dim
        bool) is given, only where it is true."""
        raise NotImplementedError

    def draw_in(self, epoch: int) -> int:
        """The number of the draw with which ``epoch`` (from 0) begins. By default perturbations are
        drawn anew before every ``reset_every``-th epoch, counted from 1."""
        return (epoch + 1) // self.reset_every if self.reset_every else 0

    def window(self, batch: Batch) -> View | None:
        """The crop and flip by which the perturbations of ``batch`` are read and written."""
        return batch.view

    def room(self) -> int:
        """The pixels around the image for which a perturbation is kept also."""
        return self.pad

    def stored(self, batch: Batch) -> Tensor:
        """The perturbations (B,C,H,W) of the samples of ``batch``, in its crops; 0 at the pixels
        that may not move."""
        return batch.threat.movable(self.store.gather(batch.index, self.window(batch), batch.x))

    def sample_state(self) -> tuple[str, ...]:
        return ("perturbations",)

    def follows_epochs(self) -> bool:
        return self.reset_every > 0 or super().follows_epochs()

    def prepare(self, setup: Setup) -> None:
        super().prepare(setup)
        self.store = SampleStore.for_run(setup, self.room())
        # On the CPU, where reading it stalls no device.
        self.resets = torch.zeros((), dtype=torch.int64)
        self.state = {"perturbations": self.store.values, "resets": self.resets}
        self.renew(0)

    def check_images(self, batch: Batch) -> None:
        self.store.check_images(batch.x.shape, self.window(batch))

    def renews(self, epoch: float) -> bool:
        """See ``Renews``."""
        return self.draw_in(int(epoch)) != int(self.resets)

    def schedule(self, update: int, epoch: float) -> None:
        super().schedule(update, epoch)
        if self.renews(epoch):
            draw = self.draw_in(int(epoch))
            self.renew(draw, self.setup.sound())
            self.resets.fill_(draw)


class StoredCorners(StoredPerturbations):
    """Stored perturbations that begin as +-eps with random signs, and anew before every
    ``reset_every``-th epoch, counted from 0.

    They are added to any crop and flip of their image, at the same places. With ``follow_crops``
    they move with the image.
    """

    initial: ClassVar[Stream]  # that of the signs

    follow_crops: bool = option(False, "move stored perturbations with the crop of their image")

    def window(self, batch: Batch) -> View | None:
        return batch.view if self.follow_crops else None

    def room(self) -> int:
        return self.pad if self.follow_crops else 0

    def draw_in(self, epoch: int) -> int:
        return epoch // self.reset_every if self.reset_every else 0

    def renew(self, draw: int, ok: Tensor | None = None) -> None:
        setup = self.setup
        self.store.fill_signs(setup.threat.nominal, setup.seed, draw, self.initial, ok)
