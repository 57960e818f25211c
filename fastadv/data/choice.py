"""Chooses the loader of a data set; format and statistics of image trees that are streamed."""

import torch

from fastadv.data.catalogue import is_tree, usual_size
from fastadv.data.dali import import_dali
from fastadv.data.dataset import grey_levels, level_statistics
from fastadv.data.decode import Format, common_format, decode, in_threads
from fastadv.data.folders import ImageTree
from fastadv.engine.process.memory import machine_memory

# ImageNet's statistics as published with torchvision's models.
_IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
_SAMPLE = 2000


def choose_loader(name: str, size_bytes: int, device: torch.device | str) -> str:
    """``"device"`` or ``"dali"``, what ``--loader auto`` means for the data set ``name``.

    ``size_bytes`` is what its images take as uint8. Up to a quarter of the device's memory they
    are kept on the device; a larger tree of files is streamed. Data sets that are not trees always
    use "device". Raises ``UserError`` with the install command if DALI is needed and missing.
    """
    if not is_tree(name) or size_bytes <= device_memory(device) // 4:
        return "device"
    import_dali()
    return "dali"


def device_memory(device: torch.device | str) -> int:
    """Memory of ``device`` in bytes; for a CPU, that of the machine."""
    if torch.device(device).type == "cuda":
        return torch.cuda.mem_get_info(device)[1]
    return machine_memory()


def stream_format(tree: ImageTree, image_size: int | None = None) -> Format:
    """The decoded format of ``tree``: ``image_size`` squared (224 for ImageNet), or the usual size.

    The usual size is that of more than half of a sample of the training images. Raises
    ``UserError`` if there is no such size.
    """
    return common_format(_sample(tree.train_files), usual_size(tree.name, image_size)).form


def stream_statistics(tree: ImageTree, form: Format) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Channel mean and std in [0,1]: ImageNet's published ones, or of a sample of about 2,000."""
    if tree.name.startswith("imagenet:") and form.channels == 3:
        return _IMAGENET
    files = _sample(tree.train_files)
    counts = torch.zeros(form.channels, 256, dtype=torch.int64)
    for image in in_threads(lambda file: decode(file, form), files, form.bytes_each):
        counts += grey_levels(torch.from_numpy(image.copy())[None])
    return level_statistics(counts)


def _sample(files: list[str]) -> list[str]:
    return files[:: -(-len(files) // _SAMPLE)]
