"""Memory that is full: one error for all devices, and trial calls that leave no trace."""

from __future__ import annotations

import ctypes
import gc
import traceback
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress

import torch
from torch import Tensor

_SIGNS = (
    *("can't allocate memory", "not enough memory", "bad_alloc", "alloc_failed"),
    *("could not create a primitive", "could not create a memory", "could not execute a primitive"),
)
"""How a CPU's allocator, CUDA's libraries and oneDNN say it, whose errors have no type of their
own."""


class OutOfMemory(torch.OutOfMemoryError):
    """A call of a step did not fit into memory and has changed nothing."""


def is_out_of_memory(error: BaseException) -> bool:
    """True if ``error`` says that memory is full, on any device."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    said = str(error).lower()
    return isinstance(error, RuntimeError) and any(sign in said for sign in _SIGNS)


@contextmanager
def full_memory_told(x: Tensor) -> Iterator[None]:
    """Raise ``OutOfMemory`` with a way out where the block, which trains on the images ``x``
    (B,C,H,W), runs out of memory. What the block has allocated is freed then."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if isinstance(error, OutOfMemory) or not is_out_of_memory(error):
            raise
        free_frames(error)
        count, shape = len(x), "x".join(map(str, x.shape[1:]))
        known = isinstance(error, (torch.OutOfMemoryError, MemoryError))
        said = "" if known else f" (PyTorch says: {str(error).splitlines()[0]})"
        raise OutOfMemory(
            f"Out of memory on {x.device} in a step on {count} images of {shape}{said}: the call "
            "has changed nothing. Take fewer images, or several calls an update (update=False)."
        ) from None


class _Enough(Exception):
    """Ends a trial."""


def fits(attempt: Callable[[], object], around: AbstractContextManager[object]) -> bool:
    """True if ``attempt()`` fits into memory; what it changes is undone by the transaction
    ``around`` it."""
    try:
        with around:
            attempt()
            raise _Enough
    except _Enough:
        return True
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        free_frames(error)
    return False


def free_frames(error: BaseException | None) -> None:
    """Free what the frames that ``error`` has passed hold: the activations of a broken pass."""
    while error is not None:
        traceback.clear_frames(error.__traceback__)
        error = error.__context__
    free_what_is_kept()


def free_what_is_kept() -> None:
    """Give back what allocators keep for later."""
    gc.collect()
    with suppress(OSError, AttributeError):  # glibc; others give it back by themselves
        ctypes.CDLL(None).malloc_trim(0)
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
