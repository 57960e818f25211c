"""Records the Triton kernels that a block launches, and the bytes of their arguments.

Nothing is timed and nothing is compiled differently: inside the block the launches of Inductor's
kernels and of our own are recorded with the bytes of their tensor arguments.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

Launches = dict[str, list[int]]
"""From a kernel's name, as a profiler shows it, to the bytes of each of its launches."""

# Kernels of ours that read and write the same argument. Inductor marks this in the argument's name.
BOTH_WAYS: Mapping[str, frozenset[str]] = {
    "_perturb_kernel": frozenset({"weights", "directions"}),
    "_restore_kernel": frozenset({"weights"}),
}


@contextmanager
def watched_launches(*, only_recorded: bool = True) -> Iterator[Launches]:
    """Record every launch in the block; ``only_recorded``: those captured in a CUDA graph.

    A replay launches what was recorded without Python: watch the step being built. Without
    Triton nothing is recorded.
    """
    seen: Launches = {}
    undo: list[Callable[[], None]] = []
    for module, name in (
        ("torch._inductor.runtime.triton_heuristics", "CachingAutotuner"),
        ("triton.runtime.jit", "JITFunction"),
    ):
        try:
            kind = getattr(import_module(module), name)
        except (ImportError, AttributeError):
            continue
        undo.append(_note_runs(kind, seen, only_recorded))
    try:
        yield seen
    finally:
        for restore in undo:
            restore()


def argument_bytes(kernel: str, arguments: Iterable[tuple[str, Any]]) -> int:
    """Bytes of the tensors among named ``arguments``, lists of tensors too: those a kernel must
    read or write at least once, twice where it does both."""
    both = BOTH_WAYS.get(kernel, frozenset())
    total = 0
    for name, value in arguments:
        times = 2 if name in both or name.startswith("in_out_ptr") else 1
        tensors = value if isinstance(value, tuple | list) else [value]
        total += times * sum(_bytes(entry) for entry in tensors if isinstance(entry, Tensor))
    return total


def _bytes(tensor: Tensor) -> int:
    # An expanded tensor has more elements than memory.
    return min(tensor.numel() * tensor.element_size(), tensor.untyped_storage().nbytes())


def _note_runs(kind: Any, seen: Launches, only_recorded: bool) -> Callable[[], None]:
    real = kind.run

    def run(self: Any, *args: Any, **kwargs: Any) -> Any:
        if not only_recorded or torch.cuda.is_current_stream_capturing():
            function = getattr(self, "fn", self)
            name = str(function.__name__)
            named = [*zip(_argument_names(self), args, strict=False), *kwargs.items()]
            seen.setdefault(name, []).append(argument_bytes(name, named))
        return real(self, *args, **kwargs)

    kind.run = run
    return lambda: setattr(kind, "run", real)


def _argument_names(kernel: Any) -> list[str]:
    # Inductor wraps Triton's function, which knows them.
    names = getattr(kernel, "arg_names", None) or getattr(kernel.fn, "arg_names", [])
    return [str(name) for name in names]
