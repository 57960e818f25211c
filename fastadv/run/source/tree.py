"""The files of a folder of images, as a run takes them."""

from __future__ import annotations

from fastadv.data import list_images
from fastadv.data.broken import LEAVE_OUT, REPAIR, note, sound
from fastadv.data.catalogue import cache_folder
from fastadv.data.choice import stream_format, stream_statistics
from fastadv.data.decode import Format, UnreadableImage
from fastadv.data.folders import ImageTree
from fastadv.run.config import RunConfig
from fastadv.run.origin import Origin

Statistics = tuple[tuple[float, ...], tuple[float, ...]]


def tree_of(config: RunConfig) -> ImageTree:
    """The files of the configured folder, without the broken ones if they are to be left out."""
    return sound(
        list_images(config.data),
        skip=config.skip_broken,
        cache=cache_folder(config.data_root),
        way_out=REPAIR if has_begun(config) else LEAVE_OUT,
    )


def has_begun(config: RunConfig) -> bool:
    """True for a run that has begun: what it leaves out is decided and was said."""
    return config.origins.get("skip_broken") is Origin.STORED


def looked_at(config: RunConfig) -> tuple[ImageTree, Format, Statistics]:
    """The tree, its format, and its channel statistics, for which a sample is decoded."""
    known: set[str] = set()
    while True:
        tree = tree_of(config)
        try:
            form = stream_format(tree, config.image_size)
            return tree, form, stream_statistics(tree, form)
        except UnreadableImage as error:  # its header and its end are fine
            if error.file in known:
                raise
            known.add(error.file)
            note(tree, [error.file], cache_folder(config.data_root))
