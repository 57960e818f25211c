"""What an epoch of training costs: images per second, and the most memory of a GPU."""

from __future__ import annotations

import time

import torch


class EpochCosts:
    """Measures one epoch on ``device``, or what is left of it after a stop."""

    def __init__(self, device: torch.device) -> None:
        self._on_gpu = device.type == "cuda"
        self._device = device
        self.begin()

    def begin(self) -> None:
        """The first batch comes next."""
        self._images, self._began, self._seconds = 0, time.monotonic(), 0.0
        if self._on_gpu:
            torch.cuda.reset_peak_memory_stats(self._device)

    def add(self, images: int) -> None:
        """A step on ``images`` images has been launched."""
        self._images += images

    def end(self) -> None:
        """The device has finished the last batch."""
        self._seconds = time.monotonic() - self._began

    def line(self) -> dict[str, float]:
        """The numbers of the epoch, for metrics.jsonl: ``images_per_second`` of this process, and
        on a GPU ``gpu_memory_peak_mib``, what PyTorch held for tensors."""
        found: dict[str, float] = {}
        if self._images and self._seconds > 0:
            found["images_per_second"] = round(self._images / self._seconds, 2)
        if self._on_gpu:
            peak = torch.cuda.max_memory_allocated(self._device)
            found["gpu_memory_peak_mib"] = round(peak / 2**20, 1)
        return found
