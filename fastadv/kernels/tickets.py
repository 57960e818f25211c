"""Counters for kernels whose last program finishes the work of all.

Each program adds 1 to its counter, and the one that finds all others counted finishes and writes 0
back. So a counter is zeroed once and not by a launch before every use. Two launches that may run at
the same time never share a counter:

- launches on one stream run one after the other and share the counters of that stream;
- a launch inside a capture gets counters of its own, since a graph may be replayed on any stream,
  beside any other work. They lie outside the graph's memory, and are never given back.
"""

from threading import Lock

import torch
from torch import Tensor

RESERVE = 2**18  # counters for captures: 1 MiB
ALIGNMENT = 4  # 16 bytes: Triton compiles a kernel again for a pointer with another alignment

_lock = Lock()
_of_streams: dict[tuple[torch.device, int, int], Tensor] = {}
_reserves: dict[torch.device, "_Reserve"] = {}


class _Reserve:
    """Zeros of one device, from which captures take their counters."""

    def __init__(self, device: torch.device) -> None:
        self.zeros = _finished_zeros(device)
        self.used = 0

    def take(self, count: int) -> Tensor | None:
        """``count`` counters that nobody had before, or None if there are not so many."""
        start = self.used
        if start + count > len(self.zeros):
            return None
        self.used += -(-count // ALIGNMENT) * ALIGNMENT
        return self.zeros[start : start + count]

    def is_half_empty(self) -> bool:
        return 2 * self.used > len(self.zeros)


_full: list[_Reserve] = []  # kept for ever, since graphs hold only the addresses of their counters


def tickets(device: torch.device, count: int) -> Tensor:
    """``count`` int32 counters (count,) on ``device``, 16-byte aligned, that are 0 when the next
    kernel on the current stream begins.

    That kernel must leave them 0 again. Inside a capture they come from a reserve, which the first
    call outside of a capture has made, as in a warm-up. If there is none, or it is used up, the
    graph zeroes counters of its own in each replay.
    """
    if not _is_capturing(device):
        return _of_the_stream(device, count)
    with _lock:
        reserve = _reserves.get(device)
        found = None if reserve is None else reserve.take(count)
    return _zeros(device, count) if found is None else found


def _of_the_stream(device: torch.device, count: int) -> Tensor:
    key = device, _stream(device), count
    found = _of_streams.get(key)
    reserve = _reserves.get(device)
    if found is not None and reserve is not None and not reserve.is_half_empty():
        return found
    with _lock:
        _make_reserve(device)
        if key not in _of_streams:
            _of_streams[key] = _zeros(device, count)
        return _of_streams[key]


def _make_reserve(device: torch.device) -> None:
    """Make the reserve, or a new one when half of it is used, so that a capture finds enough."""
    old = _reserves.get(device)
    if old is not None and not old.is_half_empty():
        return
    if old is not None:
        _full.append(old)
    _reserves[device] = _Reserve(device)


def _finished_zeros(device: torch.device) -> Tensor:
    """The counters of a reserve, zeroed before this returns, since any stream may use them. They
    are zeroed on a stream of their own, so that this does not wait for other work."""
    if device.type != "cuda":
        return _zeros(device, RESERVE)
    stream = torch.cuda.Stream(device)
    with torch.cuda.stream(stream):
        zeros = _zeros(device, RESERVE)
        done = stream.record_event()
    done.synchronize()
    return zeros


def _zeros(device: torch.device, count: int) -> Tensor:
    return torch.zeros(count, dtype=torch.int32, device=device)


def _stream(device: torch.device) -> int:
    """A number of the current stream."""
    if device.type != "cuda":
        return 0
    return int(torch._C._cuda_getCurrentRawStream(device.index))


def _is_capturing(device: torch.device) -> bool:
    if device.type != "cuda":
        return False
    if device.index == torch.cuda.current_device():
        return torch.cuda.is_current_stream_capturing()
    with torch.cuda.device(device):
        return torch.cuda.is_current_stream_capturing()
