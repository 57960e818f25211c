"""PyTorch's ``batch_norm``, and another function in its place for a while.

It is replaced by name, since a ``TorchFunctionMode`` is off inside of ``torch.autograd.grad``,
where a checkpointed module is forwarded again. While it is replaced, other threads
call the replacement as well.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from torch import Tensor
from torch.nn import functional

pytorchs: Callable[..., Tensor] = functional.batch_norm


def is_pytorchs() -> bool:
    """True if no code has replaced the function at present."""
    return functional.batch_norm is pytorchs


@contextmanager
def replaced(own: Callable[..., Tensor]) -> Iterator[None]:
    """Within this context ``torch.nn.functional.batch_norm`` is ``own``."""
    around, functional.batch_norm = functional.batch_norm, own
    try:
        yield
    finally:
        functional.batch_norm = around
