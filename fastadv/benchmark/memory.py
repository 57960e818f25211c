"""Peak memory of a piece of work: the allocator's on CUDA, the process's resident set on a CPU."""

from __future__ import annotations

import re
from pathlib import Path

import torch

_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


class PeakMemory:
    """Counts from its making on. On a CPU the number is the whole process's, as Linux tells it."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
            self._before: int | None = torch.cuda.memory_allocated(device)
        else:
            self._before = _status("VmRSS")

    def forget(self) -> None:
        """Do not count what came before: compiling takes more memory than any step.

        On CUDA compiling leaves no mark on the allocator, while capturing a graph is the only
        time its memory is seen: there nothing is forgotten.
        """
        if self.device.type != "cuda":
            try:
                _CLEAR.write_text("5")
            except OSError:
                self._before = None

    def bytes(self) -> int | None:
        """The peak above what was in use at the start; None where the system does not tell."""
        if self.device.type == "cuda":
            peak: int | None = torch.cuda.max_memory_allocated(self.device)
        else:
            peak = _status("VmHWM")
        if peak is None or self._before is None:
            return None
        return max(0, peak - self._before)


def _status(field: str) -> int | None:
    found = re.search(rf"{field}:\s+(\d+) kB", _STATUS.read_text()) if _STATUS.exists() else None
    return int(found.group(1)) * 1024 if found else None
