"""A run that was read back: its network, its settings, what it measured, and its images."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import nn

from fastadv.data import is_tree
from fastadv.engine.process.device import choose_device
from fastadv.errors import NotThere, UserError, warn
from fastadv.run import provenance
from fastadv.run.absent import absent_source
from fastadv.run.begun import Begun
from fastadv.run.built_for import BuiltFor
from fastadv.run.config import RunConfig
from fastadv.run.described import described
from fastadv.run.run_folder import RunFolder
from fastadv.run.saved_models import SavedNetwork
from fastadv.run.session import built_for
from fastadv.run.source import EvalBatches, Source, open_source
from fastadv.run.which import one_named, weights_file
from fastadv.storage import checkpoint
from fastadv.storage.printable import printable
from fastadv.threat import Threat

OTHER_TEST_IMAGES = "other test images"
"""What test images are called that are not those which the run was begun with."""


@dataclass(frozen=True, repr=False)
class Run:
    """A run, as ``load_run`` gives it.

    ``model`` maps images (B,C,H,W) in [0,1] to logits (B,classes), in eval mode. ``config`` holds
    every setting of the run by its name. The data are read when one of ``test``, ``validation`` and
    ``training`` is asked for the first time: each is a set of labelled images, not augmented, that
    gives batches ``(images, labels)`` as often as it is iterated.
    """

    folder: RunFolder
    which: str
    config: RunConfig
    model: nn.Module
    built_for: BuiltFor
    device: torch.device
    _saved: Mapping[str, Any]
    _told: Mapping[str, str]

    def __repr__(self) -> str:
        return described(self.folder, self.config, self.which, self._saved)

    @property
    def method(self) -> str:
        return self.config.method

    @property
    def threat(self) -> Threat:
        """The ball that the run was trained for."""
        return Threat(self.config.norm, self.config.eps)

    @property
    def classes(self) -> tuple[str, ...]:
        """The names of the classes, in the order of the logits; () where the data name none."""
        return self.built_for.classes

    @cached_property
    def metrics(self) -> list[dict[str, Any]]:
        """A line for each epoch, as in metrics.jsonl."""
        return self.folder.read_metrics()

    @cached_property
    def summary(self) -> dict[str, Any] | None:
        """The final scores of the run; None if it has not ended."""
        return self.folder.read_summary()

    @property
    def test(self) -> EvalBatches:
        """The test images, all of them."""
        return self.source.test.limited(None)

    @property
    def validation(self) -> EvalBatches:
        """The images by which the best epoch was chosen. Raises ``UserError`` if that was the test
        set."""
        return self.source.evaluated_on("val")

    @property
    def training(self) -> EvalBatches:
        """The images that were trained on, with the labels that were trained on."""
        return self.source.training

    @cached_property
    def source(self) -> Source:
        """The data on ``device``.

        Where they are gone, their test images still stand for what was found on them before; to
        look at them raises ``UserError`` with the option that says where they are.
        """
        known = self._saved.get("test_images")
        try:
            config = self.folder.read_config(self._told, needs=("data",))
            if "data" in self._told and is_tree(config.data) and config.image_size is None:
                height, width = self.built_for.image_size
                config = replace(config, image_size=height if height == width else None)
            # Pseudo-labelled images are only trained on.
            known_files = is_tree(config.data) and "data" not in self._told
            begun = Begun.read(self.folder, config).files if known_files else None
            data = open_source(replace(config, unlabelled=None), self.device, begun=begun)
        except NotThere as error:
            return absent_source(self.config, self.built_for, known, self.device, str(error))
        _require_alike(self.built_for, built_for(data), str(self.folder.path), config.data)
        test = data.test
        if _others(known, data):
            shown = printable(config.data)
            warn(
                f"The test images of {shown} are not those that {printable(self.folder.path)} was "
                "begun with: results on them are kept apart."
            )
            test = test.named(OTHER_TEST_IMAGES)
        # The network scales pixels by the numbers it was trained with.
        own = self.built_for
        validation = test if data.validation is data.test else data.validation
        return replace(data, mean=own.mean, std=own.std, test=test, validation=validation)

    @property
    def evaluated(self) -> tuple[RunConfig, Source, nn.Module]:
        """What an evaluation takes of the run."""
        return self.config, self.source, self.model


def load_run(
    path: str,
    which: str = "best",
    *,
    data: str | None = None,
    data_root: str | None = None,
    device: str | None = "cpu",
) -> Run:
    """The run in the folder ``path``, with the weights ``which``: "best", "last" or the number of
    an epoch whose weights were kept.

    Nothing of the data is needed but for their images; where the data have moved, ``data`` and
    ``data_root`` are their new place, as for ``fastadv train``. The network and the images are on
    ``device`` (None: the run's). Raises ``UserError`` for a folder without a run, and for damaged
    files.
    """
    folder = RunFolder.open(str(path))
    which = one_named(str(which))
    file = weights_file(folder, which)
    config = folder.read_config()
    if file == folder.last and config.plan.averaging is not None and folder.summary.exists():
        raise UserError(
            f"{printable(folder.averaged)} is missing, and last.pt holds other weights than those "
            "the run ended with: restore it, or evaluate the best weights."
        )
    try:
        found = SavedNetwork.read(folder, file)
    except checkpoint.DamagedError as error:
        if file != folder.best or not folder.last.exists():
            raise
        raise UserError(f"{error} Its last weights may be whole: --which last.") from None
    model = found.model()
    _warn_of_other_code(config, folder)
    place = choose_device(config.device if device is None else device)
    told = {"data": data, "data_root": data_root}
    return Run(
        folder,
        which,
        config,
        model.to(place),
        found.built_for,
        place,
        found.saved,
        {name: value for name, value in told.items() if value is not None},
    )


def _warn_of_other_code(config: RunConfig, folder: RunFolder) -> None:
    now = provenance.source(config.model)
    if not now or not folder.last.exists():
        return
    if checkpoint.load(folder.last)["provenance"]["machine"]["source of the network"] != now:
        warn(
            f"the code of {config.model} is not what {printable(folder.path)} was trained with, so "
            "the results may belong to another network."
        )


def _others(known: object, data: Source) -> bool:
    """True if the test images of ``data`` are not the ``known`` ones of a checkpoint; False where
    nothing is known, or where the files were read in another way."""
    if not isinstance(known, Mapping) or known.get("streamed") != data.streams:
        return False
    return bool(known.get("content") != data.test.content)


def _require_alike(own: BuiltFor, other: BuiltFor, run: str, data: str) -> None:
    """Raise ``UserError`` unless the images and classes of ``data`` are of the kind that the
    network of ``run`` is for."""
    run, data = printable(run), printable(data)
    for kind, mine, others in (
        ("classes", own.num_classes, other.num_classes),
        ("channels", own.in_channels, other.in_channels),
    ):
        if mine != others:
            raise UserError(
                f"{data} has {others} {kind}, and the network of {run} is for {mine}: name data "
                "with as many, --data."
            )
    if own.image_size != other.image_size:
        sides = [f"{height}x{width}" for height, width in (other.image_size, own.image_size)]
        raise UserError(
            f"The images of {data} are {sides[0]}, and the network of {run} is for {sides[1]}: "
            "name data with images of that size, --data."
        )
    for name, another in zip(own.classes, other.classes, strict=False):
        if name != another:
            raise UserError(
                f"{data} has a class {printable(another)!r} where {run} has {printable(name)!r}: "
                "name its folders as those that the network was trained on."
            )
