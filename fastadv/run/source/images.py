"""The images of a run."""

from __future__ import annotations

from dataclasses import dataclass

from fastadv.data import Loader
from fastadv.data.listing import Placed
from fastadv.errors import UserError, unknown
from fastadv.run.source.batches import EvalBatches

SETS = ("train", "val", "test")


@dataclass
class Source:
    """The images of a run. ``num_samples`` images have an index; ``trained_on`` of them are trained
    on, the others are held out.

    ``training`` are the labelled images that are trained on, without augmentation and with the
    labels that are trained on. ``validation`` and ``test`` have their true labels, and are one set
    if the best epoch is chosen on the test set.
    """

    num_samples: int
    trained_on: int
    num_classes: int
    classes: tuple[str, ...]
    """The names of the classes; () where they have none."""
    channels: int
    image_size: tuple[int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    loader: Loader
    training: EvalBatches
    validation: EvalBatches
    test: EvalBatches
    streams: bool
    content: dict[str, str]
    """Name of a set -> its digest. Another digest is another run."""
    files: Placed | None = None
    """Of a folder of images: the files that the run was begun with, and which are there."""

    def evaluated_on(self, name: str) -> EvalBatches:
        """The images that ``name``, one of ``SETS``, stands for. Raises ``UserError`` for another
        name, and for validation images if there are none."""
        if name not in SETS:
            raise unknown("set of images", name, SETS)
        if name == "val" and self.validation is self.test:
            raise UserError(
                "The run chose its best epoch on the test set and held out no validation images: "
                "evaluate it --on test or --on train."
            )
        return {"train": self.training, "val": self.validation, "test": self.test}[name]
