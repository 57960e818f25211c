"""Data sets, and loaders that give ``(index, image, label, view)`` on the device."""

from fastadv.data.augmented import Loader
from fastadv.data.autoaugment import AutoAugmented
from fastadv.data.batch import LoaderBatch
from fastadv.data.catalogue import DATA_SETS, is_tree, list_images, load
from fastadv.data.choice import choose_loader, stream_format, stream_statistics
from fastadv.data.dali import DaliLoader
from fastadv.data.dataset import Dataset, split_validation
from fastadv.data.device_loader import DeviceLoader, eval_batches
from fastadv.data.mixed_loader import MixedLoader
from fastadv.data.view import View

__all__ = [
    "DATA_SETS",
    "AutoAugmented",
    "DaliLoader",
    "Dataset",
    "DeviceLoader",
    "Loader",
    "LoaderBatch",
    "MixedLoader",
    "View",
    "choose_loader",
    "eval_batches",
    "is_tree",
    "list_images",
    "load",
    "split_validation",
    "stream_format",
    "stream_statistics",
]
