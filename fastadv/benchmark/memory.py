"""Peak memory of a piece of work: the allocator's on CUDA, the process's resident set on a CPU."""

from __future__ import annotations

import torch

from fastadv.engine.process import memory


class PeakMemory:
    """Peak memory since construction; on a CPU that of the whole process, from Linux."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
            self._before: int | None = torch.cuda.memory_allocated(device)
        else:
            self._before = memory.resident()

    def forget(self) -> None:
        """Restart the count: compiling takes more memory than any step.

        Does nothing on CUDA: compiling does not use the allocator, and the memory of a graph is
        visible only during its capture.
        """
        if self.device.type != "cuda" and not memory.forget_peak():
            self._before = None

    def bytes(self) -> int | None:
        """The peak above the use at the start; None if the system does not report it."""
        if self.device.type == "cuda":
            peak: int | None = torch.cuda.max_memory_allocated(self.device)
        else:
            peak = memory.peak()
        if peak is None or self._before is None:
            return None
        return max(0, peak - self._before)
