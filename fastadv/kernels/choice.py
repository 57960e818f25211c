"""Which face of a kernel runs: Triton on CUDA tensors it can take, else the PyTorch reference."""

import importlib.util
import os
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from . import reference, reference_gradients

TRITON_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
TRITON_INSTALLED = importlib.util.find_spec("triton") is not None
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"

REFERENCES: dict[str, Callable[..., Any]] = {
    **{name: getattr(reference, name) for name in reference.__all__},
    "masked_ce_backward": reference_gradients.masked_ce_backward,
    "masked_ce_forward": reference_gradients.masked_ce_forward,
    "top_n_forward": reference_gradients.top_n_forward,
    "trades_kl_backward": reference_gradients.trades_kl_backward,
    "trades_kl_forward": reference_gradients.trades_kl_forward,
}


def _leaves(values: Iterable[Any]) -> Iterator[Any]:
    for value in values:
        if isinstance(value, (list, tuple)):
            yield from _leaves(value)
        else:
            yield value


def device_of(values: Iterable[Any]) -> torch.device:
    """The device of the first tensor that is more than a scalar; the CPU where there is none."""
    for leaf in _leaves(values):
        if isinstance(leaf, Tensor) and leaf.dim():
            return leaf.device
    return torch.device("cpu")


def why_not_triton(device: torch.device, values: Iterable[Any] = ()) -> str | None:
    """Why the Triton face cannot run on ``device`` with these arguments; None if it can."""
    if not TRITON_INSTALLED:
        return "Triton is not installed"
    if device.type != "cuda" and not INTERPRETED:
        return f"Triton needs a CUDA device and this is {device.type}"
    for leaf in _leaves(values):
        # A scalar's dtype does not matter: kernels load it as float32.
        dtype = leaf.dtype if isinstance(leaf, Tensor) and leaf.dim() else leaf
        if (
            isinstance(dtype, torch.dtype)
            and dtype.is_floating_point
            and dtype not in TRITON_DTYPES
        ):
            return f"the kernels compute in float32, which is not enough for {dtype}"
    return None


def triton_function(name: str) -> Callable[..., Any]:
    """The Triton face of ``name``; imports Triton."""
    from . import triton_face

    return triton_face.FUNCTIONS[name]


def call(name: str, *args: Any, face: str | None = None, **kwargs: Any) -> Any:
    """Run the kernel ``name`` eagerly; ``face`` None chooses, "triton" or "reference" insists.

    Raises ``RuntimeError``, with the reason, where the face asked for cannot run, and
    ``ValueError`` for another face.
    """
    if face not in (None, "triton", "reference"):
        raise ValueError(f"face must be 'triton' or 'reference', not {face!r}.")
    values = (*args, *kwargs.values())
    device = device_of(values)
    if face == "reference" or (face is None and device.type != "cuda"):
        return REFERENCES[name](*args, **kwargs)
    problem = why_not_triton(device, values)
    if problem is None:
        return triton_function(name)(*args, **kwargs)
    if face == "triton":
        raise RuntimeError(f"The Triton face of {name} cannot run: {problem}.")
    return REFERENCES[name](*args, **kwargs)


def faces(device: torch.device | str) -> dict[str, tuple[str, str]]:
    """For each kernel the face that runs on ``device`` ("triton" or "reference"), and why."""
    problem = why_not_triton(torch.device(device))
    if torch.device(device).type != "cuda" and problem is None:
        problem = "the interpreter of Triton is for tests"
    choice = ("reference", problem) if problem else ("triton", "CUDA device and Triton are here")
    return dict.fromkeys(reference.__all__, choice)
