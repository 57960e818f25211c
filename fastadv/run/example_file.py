"""The adversarial examples of one attack in a ``.npy`` file that grows batch by batch.

The file has its full size from the beginning and is mapped into memory, so that no more is held
than the system wants to; several processes write their rows of the same file.
"""

from __future__ import annotations

import io
import math
import os
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from fastadv.engine.process import distributed
from fastadv.evaluation.arrivals import Arrivals, Values
from fastadv.storage.files import flags

_NO_LINK = flags("O_NOFOLLOW")


class ExampleFile:
    """``path`` with an image for each of ``count`` places; until ``finish`` its name ends with
    ".partial". Symbolic links of either name are not followed. Raises ``OSError``."""

    def __init__(self, path: Path, count: int) -> None:
        self.path, self._count = path, count
        self._partial = path.with_name(path.name + ".partial")
        self._rows: np.memmap | None = None
        self._arrivals = Arrivals(self._write)

    def has_begun(self, ended: bool) -> bool:
        """True if there are examples of an interrupted evaluation; ``ended``: after all images."""
        return self._partial.exists() or (ended and self.path.exists())

    def put(self, place: Tensor, x_adv: Tensor) -> None:
        """Keep ``x_adv`` (n,...) of the images at ``place`` (n,)."""
        self._arrivals.send({"place": place, "x_adv": x_adv})

    def get(self, place: np.ndarray) -> Tensor:
        """What was kept of the images at ``place`` (n,)."""
        if self._rows is None:
            with os.fdopen(os.open(self._partial, os.O_RDWR | _NO_LINK), "r+b") as file:
                np.lib.format.read_magic(file)
                shape, _, dtype = np.lib.format.read_array_header_1_0(file)
                self._rows = np.memmap(file, dtype, "r+", file.tell(), shape)
        return torch.from_numpy(self._rows[place].copy())

    def _write(self, values: Values) -> None:
        images = values["x_adv"].contiguous().numpy()
        if self._rows is None:
            self._rows = self._mapped(images.shape[1:], images.dtype)
        self._rows[values["place"].numpy()] = images

    def _mapped(self, shape: tuple[int, ...], dtype: np.dtype) -> np.memmap:
        """All processes write the same header, so that it does not matter who is first."""
        whole = (self._count, *shape)
        head = io.BytesIO()
        np.lib.format.write_array_header_1_0(
            head,
            {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": whole},
        )
        handle = os.open(self._partial, os.O_RDWR | os.O_CREAT | _NO_LINK, 0o666)
        with os.fdopen(handle, "r+b") as file:
            file.write(head.getvalue())
            file.flush()
            size = head.tell() + math.prod(whole) * dtype.itemsize
            file.truncate(size)
            if hasattr(os, "posix_fallocate"):  # a full disk is noticed here, not in the mapping
                os.posix_fallocate(handle, 0, size)
            return np.memmap(file, dtype, "r+", head.tell(), whole)

    def settle(self) -> None:
        """Wait until all that was put is in the file."""
        self._arrivals.settle()
        if self._rows is not None:
            self._rows.flush()

    def finish(self) -> None:
        """Give the file its name, once all processes have settled."""
        self._rows = None
        if distributed.rank() == 0 and self._partial.exists():
            os.replace(self._partial, self.path)
