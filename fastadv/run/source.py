"""The images of a run: a data set in memory, or files that are decoded while training."""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastadv.data import (
    DeviceLoader,
    Loader,
    MixedLoader,
    augmentations,
    draws,
    eval_batches,
    is_tree,
    list_images,
    load,
)
from fastadv.data.broken import LEAVE_OUT, REPAIR, BrokenImages, note, sentence, sound
from fastadv.data.catalogue import cache_folder, load_tree
from fastadv.data.choice import choose_loader, stream_format, stream_statistics
from fastadv.data.dali import DaliLoader
from fastadv.data.dataset import Dataset, split_labels
from fastadv.data.decode import Format, UnreadableImage
from fastadv.data.folders import ImageTree
from fastadv.data.image_sizes import SizedByEpoch, require_within
from fastadv.data.label_noise import noisy_labels
from fastadv.data.labels import stratified_rows
from fastadv.data.leaving_out import LeavingOut
from fastadv.data.listing import Listing, Placed, place
from fastadv.data.packed import tell, tell_left_out
from fastadv.engine.process import distributed
from fastadv.errors import UserError, unknown
from fastadv.run.config import RunConfig
from fastadv.run.origin import Origin
from fastadv.run.pseudo_labels import read_pseudo_labelled
from fastadv.storage.digests import digest

SETS = ("train", "val", "test")


def eval_batch_size(device: torch.device, values: int) -> int:
    """Images per evaluation batch, where one image has ``values`` numbers.

    On a CPU 100 images of CIFAR's size are as fast as more, and an interruption loses less; of
    smaller images it takes more, of larger ones fewer.
    """
    if device.type != "cpu":
        return 500
    return min(500, max(8, 100 * 3 * 32 * 32 // values))


Statistics = tuple[tuple[float, ...], tuple[float, ...]]
LabelledImages = tuple[Tensor, Tensor]
Read = Callable[[Tensor, Tensor, int], Iterable[LabelledImages]]
"""From the labels (N,) of a set, rows of it and a batch size to the batches of these rows."""


class EvalBatches:
    """Labelled images in order, batch by batch, as often as asked.

    ``batches(rows, batch_size)`` gives the chosen ones of the images whose labels are ``labels``
    (N,). At most ``limit`` of them are evaluated, each class in proportion, always the same ones.
    ``name`` says what they are. ``content`` is a digest of all N: the networks of two runs can be
    compared on images with the same one. ``wrong_labels`` is how many of the N labels are not the
    true ones, because of label noise.
    """

    def __init__(
        self,
        batches: Callable[[Tensor, int], Iterable[LabelledImages]],
        labels: Tensor,
        batch_size: int,
        limit: int | None = None,
        *,
        name: str = "images",
        content: str = "",
        wrong_labels: int = 0,
    ) -> None:
        self._batches, self._labels, self.batch_size = batches, labels.cpu(), batch_size
        self.name, self.content, self.wrong_labels = name, content, wrong_labels
        self.rows = torch.arange(len(labels))
        if limit is not None and limit < len(labels):
            self.rows = stratified_rows(self._labels, limit, draws.LIMIT, seed=0)

    @property
    def count(self) -> int:
        """How many images the set has, of which some may be left out."""
        return len(self._labels)

    def named(self, name: str) -> EvalBatches:
        """The same images, all of them, under another name."""
        found = self.limited(None)
        found.name = name
        return found

    def limited(self, limit: int | None) -> EvalBatches:
        """The same images, at most ``limit`` of them."""
        return EvalBatches(
            self._batches,
            self._labels,
            self.batch_size,
            limit,
            name=self.name,
            content=self.content,
            wrong_labels=self.wrong_labels,
        )

    @property
    def label_noise(self) -> str:
        """How many of the set's labels are wrong, in words."""
        count = len(self._labels)
        return f"{100 * self.wrong_labels / count:.1f} % of {count:,} labels are wrong"

    def __len__(self) -> int:
        return len(self.rows)

    def __iter__(self) -> Iterator[LabelledImages]:
        # Processes take batches in turn: each must find one.
        share = -(-len(self.rows) // distributed.world_size())
        yield from self._batches(self.rows, max(1, min(self.batch_size, share)))


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


def open_source(
    config: RunConfig, device: torch.device, views: int = 1, begun: Listing | None = None
) -> Source:
    """The configured data on ``device``; ``views=2`` draws a second view of each image. ``begun``
    are the files that the run was begun with, if it is a folder of images that goes on.

    ``loader="auto"`` keeps a set on the device if it takes a quarter of its memory at most, and
    streams a larger tree of files through DALI. Raises ``UserError`` for data and a method that
    cannot go together.
    """
    _require_one_update_a_row(config)
    _require_pixels_to_follow(config)
    options: dict[str, Any] = {
        "batch_size": _own_batch_size(config),
        "rank": distributed.rank(),
        "world_size": distributed.world_size(),
        "whole": config.bn == "global",
        "device": device,
        "seed": config.seed,
        "pad": config.pad,
        "flip": config.flip,
        "padding": config.padding,
        "views": views,
        "channels_last": True,
    }
    kind = _loader(config, device)
    if kind == "dali" and config.unlabelled is not None:
        raise UserError("--unlabelled mixes images in memory; omit --loader dali.")
    if kind == "dali":
        return _sized(config, _augmented(config, _from_files(config, device, options, begun)))
    return _sized(config, _augmented(config, _from_memory(config, device, options, begun)))


def _require_one_update_a_row(config: RunConfig) -> None:
    if config.unlabelled is not None and config.plan.keeps_sample_state:
        raise UserError(
            "--unlabelled draws images with replacement, so a batch may hold the same one twice, "
            f"with two updates of the state that {config.method} keeps per sample; omit it, "
            "or choose parts without state per sample."
        )


def _require_pixels_to_follow(config: RunConfig) -> None:
    does = augmentations.does(config.augmentation)
    if does and config.plan.keeps_perturbations:
        raise UserError(
            f"--augmentation {config.augmentation} {does} images, and a perturbation kept for each "
            f"sample cannot follow; omit it with {config.method}."
        )


def _augmented(config: RunConfig, source: Source) -> Source:
    """``source`` with the configured augmentation beyond crop and flip."""
    loader = augmentations.augmented(
        source.loader,
        config.augmentation,
        seed=config.seed,
        epochs=config.epochs,
        channels=source.channels,
        num_classes=source.num_classes,
        crops_files=source.streams,
    )
    return dataclasses.replace(source, loader=loader)


def _sized(config: RunConfig, source: Source) -> Source:
    """``source`` with training images of the configured sizes."""
    if config.image_sizes is None:
        return source
    require_within(config.image_sizes, source.image_size)
    return dataclasses.replace(source, loader=SizedByEpoch(source.loader, config.image_sizes))


def _own_batch_size(config: RunConfig) -> int:
    """The images of a step that one process takes; all processes take equally many."""
    whole, processes = config.batch_size, distributed.world_size()
    if whole % processes:
        raise UserError(
            f"--batch-size is the whole step's, {whole} images, which {processes} processes "
            "cannot share equally; choose a multiple, or another number of processes."
        )
    return whole // processes


def _loader(config: RunConfig, device: torch.device) -> str:
    if config.loader != "auto":
        if config.loader == "dali" and not is_tree(config.data):
            raise UserError(
                "--loader dali streams trees of image files (folder:, imagenet:), not "
                f"{config.data}; omit --loader."
            )
        return config.loader
    if not is_tree(config.data):
        return "device"
    tree = _tree(config)
    form = stream_format(tree, config.image_size)
    count = len(tree.train_files)
    if config.limit is not None:
        count = min(count, config.limit)
    size = count * form.channels * form.height * form.width
    return choose_loader(config.data, size, device)


def _tree(config: RunConfig) -> ImageTree:
    """The files of the configured folder, without the broken ones if they are to be left out."""
    return sound(
        list_images(config.data),
        skip=config.skip_broken,
        cache=cache_folder(config.data_root),
        way_out=REPAIR if _has_begun(config) else LEAVE_OUT,
    )


def _has_begun(config: RunConfig) -> bool:
    """True for a run that has begun: what it leaves out is decided and was said."""
    return config.origins.get("skip_broken") is Origin.STORED


def _looked_at(config: RunConfig) -> tuple[ImageTree, Format, Statistics]:
    """The tree, its format, and its channel statistics, for which a sample is decoded."""
    known: set[str] = set()
    while True:
        tree = _tree(config)
        try:
            form = stream_format(tree, config.image_size)
            return tree, form, stream_statistics(tree, form)
        except UnreadableImage as error:  # its header and its end are fine
            if error.file in known:
                raise
            known.add(error.file)
            note(tree, [error.file], cache_folder(config.data_root))


class _Divided(NamedTuple):
    """The ``rows`` that are trained on, the ``labels`` (N,) of which training sees theirs, and the
    sets that are evaluated."""

    rows: Tensor
    labels: Tensor
    training: EvalBatches
    validation: EvalBatches
    test: EvalBatches


def _divided(
    config: RunConfig,
    trained: tuple[Tensor, Read],
    tested: tuple[Tensor, Read],
    num_classes: int,
    batch_size: int,
    content: Mapping[str, str],
    absent: Collection[int] = (),
) -> _Divided:
    """The training set (true labels, and how to read it) divided into what is trained on and what
    is held out, with noise in the labels of the former; and the test set. Nothing is evaluated on
    the ``absent`` rows."""
    true, read = trained
    rows, held_out = split_labels(true, config.val_fraction, config.seed)
    if config.select == "test":
        rows = torch.arange(len(true))
    noisy = noisy_labels(true, config.label_noise, num_classes, config.seed)

    def of_training_data(name: str, labels: Tensor, places: Tensor) -> EvalBatches:
        if absent:
            places = torch.tensor([row for row in places.tolist() if row not in absent])
        return EvalBatches(
            lambda chosen, together: read(labels, places[chosen], together),
            labels[places],
            batch_size,
            name=name,
            content=digest([content["training data"], places, labels[places]]),
            wrong_labels=int((labels != true)[places].sum()),
        )

    labels, read_test = tested
    test = EvalBatches(
        lambda chosen, together: read_test(labels, chosen, together),
        labels,
        batch_size,
        config.test_limit,
        name="test images",
        content=content["test data"],
    )
    return _Divided(
        rows,
        noisy,
        of_training_data("training images", noisy, rows),
        test if config.select == "test" else of_training_data("validation images", true, held_out),
        test,
    )


def _from_memory(
    config: RunConfig, device: torch.device, options: dict[str, Any], begun: Listing | None
) -> Source:
    data, files = _loaded(config, begun)
    absent = set() if files is None else files.absent
    count = len(data.train_images)
    content = {
        "training data": digest([data.train_images, data.train_labels]),
        "test data": digest([data.test_images, data.test_labels]),
    }
    if files is not None:
        content, files = _as_begun(content, files)

    def reading(images: Tensor) -> Read:
        def read(labels: Tensor, places: Tensor, batch_size: int) -> Iterator[LabelledImages]:
            for part in places.split(batch_size):
                yield from eval_batches(images[part], labels[part], len(part), device)

        return read

    sets = _divided(
        config,
        (data.train_labels, reading(data.train_images)),
        (data.test_labels, reading(data.test_images)),
        data.num_classes,
        eval_batch_size(device, math.prod(data.train_images.shape[1:])),
        content,
        absent,
    )
    rows = sets.rows
    loader: Loader
    if config.unlabelled is None:
        loader = DeviceLoader(data.train_images, sets.labels, indices=rows, **options)
    else:
        more, labels = read_pseudo_labelled(config.unlabelled, data.num_classes)
        count += len(more)
        content["--unlabelled data"] = digest([more, labels])
        loader = MixedLoader(data.train_images, sets.labels, more, labels, indices=rows, **options)
    return Source(
        num_samples=count,
        trained_on=len(rows) + count - len(data.train_images),
        num_classes=data.num_classes,
        classes=data.classes,
        channels=data.train_images.shape[1],
        image_size=(data.train_images.shape[2], data.train_images.shape[3]),
        mean=data.mean,
        std=data.std,
        loader=loader if files is None else LeavingOut(loader, absent),
        training=sets.training,
        validation=sets.validation,
        test=sets.test,
        streams=False,
        content=content,
        files=files,
    )


def _loaded(config: RunConfig, begun: Listing | None) -> tuple[Dataset, Placed | None]:
    """The data set, and where its files are among those that the run was begun with. The images of
    absent rows are black."""
    root, size = config.data_root, config.image_size
    broken = {"skip_broken": config.skip_broken, "begun": _has_begun(config)}
    # Another file would make another choice of a limited number.
    if not is_tree(config.data) or config.limit is not None:
        data = load(
            config.data,
            root=root,
            download=config.download,
            limit=config.limit,
            image_size=size,
            **broken,
        )
        return data, None
    data, tree = load_tree(config.data, root, size, **broken)
    files = place(tree, begun)
    if len(files.train) == len(files.listing.train):
        return data, files
    images = torch.zeros(len(files.listing.train), *data.train_images.shape[1:], dtype=torch.uint8)
    images[files.train] = data.train_images
    labels = files.listing.labels
    return dataclasses.replace(data, train_images=images, train_labels=labels), files


def _as_begun(content: dict[str, str], files: Placed) -> tuple[dict[str, str], Placed]:
    """``content``, the digests of the sets as they are; with the digest that a set was begun with
    in place of that of the files that are left. The marks of the files say that they are the same.
    """
    known = files.listing.content
    if not known:
        return content, dataclasses.replace(
            files, listing=dataclasses.replace(files.listing, content=content)
        )
    found = dict(content)
    if len(files.train) < len(files.listing.train):
        found["training data"] = known.get("training data", "")
    if len(files.test) < len(files.listing.test):
        found["test data"] = known.get("test data", "")
    return found, files


def _digest_of_files(files: Iterable[str], labels: Iterable[int]) -> str:
    """Of files that are too many to be read at once: their names below the class, sizes, labels."""
    entries = zip(files, labels, strict=True)
    return digest([(*Path(file).parts[-2:], os.stat(file).st_size, int(y)) for file, y in entries])


def _from_files(
    config: RunConfig, device: torch.device, options: dict[str, Any], begun: Listing | None
) -> Source:
    if config.limit is not None:
        raise UserError("--limit is for data sets in memory; omit it with --loader dali.")
    tree, form, (mean, std) = _looked_at(config)
    if not _has_begun(config):
        tell_left_out(tree)
    files = place(tree, begun)
    absent = files.absent
    content = {
        "training data": _digest_of_files(tree.train_files, tree.train_labels),
        "test data": _digest_of_files(tree.test_files, tree.test_labels),
    }
    content, files = _as_begun(content, files)
    train_files = [""] * len(files.listing.train)  # without a name: not there any more
    for row, file in zip(files.train.tolist(), tree.train_files, strict=True):
        train_files[row] = file

    def on_broken(found: list[str]) -> None:
        note(tree, found, cache_folder(config.data_root))
        if not config.skip_broken:
            raise BrokenImages(sentence(tree, found, REPAIR), found)
        tell(sentence(tree, found, "they are left out from here on"))

    def reading(files: list[str]) -> Read:
        def read(labels: Tensor, places: Tensor, batch_size: int) -> Iterator[LabelledImages]:
            common: dict[str, Any] = {"batch_size": batch_size, "device": device}
            common["on_broken"] = on_broken
            return DaliLoader(files, labels.tolist(), form, indices=places, **common).ordered()

        return read

    sets = _divided(
        config,
        (files.listing.labels, reading(train_files)),
        (torch.tensor(tree.test_labels), reading(tree.test_files)),
        len(tree.classes),
        eval_batch_size(device, form.bytes_each),
        content,
        absent,
    )
    rows, labels = sets.rows, sets.labels
    options["resized_crop"] = augmentations.CROP in augmentations.names_in(config.augmentation)
    options |= {"absent": absent, "on_broken": on_broken}
    loader = DaliLoader(train_files, labels.tolist(), form, indices=rows, **options)
    return Source(
        num_samples=len(labels),
        trained_on=len(rows),
        num_classes=len(tree.classes),
        classes=tree.classes,
        channels=form.channels,
        image_size=(form.height, form.width),
        mean=mean,
        std=std,
        loader=LeavingOut(loader, absent),
        training=sets.training,
        validation=sets.validation,
        test=sets.test,
        streams=True,
        content=content,
        files=files,
    )
