"""The public function of an entry: it runs Triton on CUDA tensors of the dtypes that the kernels
take, and the PyTorch reference otherwise."""

import functools
import importlib
import importlib.util
import inspect
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor

from .registration import Autograd, Fake, register

P = ParamSpec("P")
R = TypeVar("R")

TRITON_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
TRITON_INSTALLED = importlib.util.find_spec("triton") is not None
CPU = torch.device("cpu")
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
# The type of device whose tensors go to Triton; tests without a GPU set it to "cpu".
TRITON_DEVICE = "cuda"


@functools.cache
def triton_function(module: str, name: str) -> Callable[..., Any]:
    """The launcher ``name`` in a module of this package; imports Triton."""
    launchers = importlib.import_module(f".{module}", __package__)
    function: Callable[..., Any] = getattr(launchers, name)
    return function


@dataclass(frozen=True)
class Operator:
    """A function in two backends, and ``traced``, which a compiler for a GPU sees instead (None: it
    sees the reference).

    ``module`` holds the Triton launcher with the name and parameters of ``reference``.
    """

    reference: Callable[..., Any]
    module: str
    traced: Callable[..., Any] | None = None

    @property
    def triton(self) -> Callable[..., Any]:
        """The Triton launcher; imports Triton."""
        return triton_function(self.module, self.reference.__name__)

    def run(self, *args: Any, backend: str | None = None, **kwargs: Any) -> Any:
        """Run eagerly with the backend "triton" or "reference"; None chooses by the arguments.

        Raises ``RuntimeError`` with the reason if the requested backend cannot run, and
        ``ValueError`` for an unknown backend.
        """
        if backend not in (None, "triton", "reference"):
            raise ValueError(f"backend must be 'triton' or 'reference', not {backend!r}.")
        values = (*args, *kwargs.values())
        device = next((t.device for t in _leaves(values) if isinstance(t, Tensor) and t.dim()), CPU)
        if backend == "reference" or (backend is None and device.type != "cuda"):
            return self.reference(*args, **kwargs)
        problem = why_not_triton(device, values)
        if problem is None:
            return self.triton(*args, **kwargs)
        if backend == "triton":
            name = self.reference.__name__
            raise RuntimeError(f"Triton cannot run {name}: {problem}; omit backend='triton'.")
        return self.reference(*args, **kwargs)


OPERATORS: dict[str, Operator] = {}


def define(
    reference: Callable[P, R],
    module: str,
    schema: str = "",
    *,
    like: str = "",
    fake: Fake | None = None,
    autograd: Autograd | None = None,
) -> Callable[P, R]:
    """The public function of an operator, with the name and signature of ``reference``.

    The device of its first argument, a tensor or a list of tensors, chooses the backend. ``module``
    is the module of the Triton launcher. ``schema`` registers the operator; it and the parameters
    after it are documented in :func:`.registration.register`.
    """
    name = reference.__name__
    first_name = next(iter(inspect.signature(reference).parameters))
    traced: Callable[..., Any] | None = None
    if schema:
        runs = Operator(reference if autograd is None else autograd.forward, module)
        traced = register(reference, schema, runs.run, like, fake, autograd)
    OPERATORS[name] = Operator(reference, module, traced)
    compiled: Callable[P, R] = traced or reference

    # Every eager call comes through here: on a CPU this adds one Python call.
    @functools.wraps(reference)
    def public(*args: P.args, **kwargs: P.kwargs) -> R:
        first: Any = args[0] if args else kwargs.get(first_name)
        if isinstance(first, (list, tuple)):
            first = next((t for t in first if t.dim()), None)
        device: torch.device = getattr(first, "device", CPU)
        if device.type != TRITON_DEVICE:
            return reference(*args, **kwargs)
        if why_not_triton(device, (*args, *kwargs.values())) is not None:
            return reference(*args, **kwargs)
        if torch.compiler.is_compiling():
            return compiled(*args, **kwargs)
        launcher: Callable[P, R] = triton_function(module, name)
        return launcher(*args, **kwargs)

    return public


def _leaves(values: Iterable[Any]) -> Iterator[Any]:
    for value in values:
        if isinstance(value, (list, tuple)):
            yield from _leaves(value)
        else:
            yield value


def why_not_triton(device: torch.device, values: Iterable[Any] = ()) -> str | None:
    """Why Triton cannot run on ``device`` with these arguments; None if it can."""
    if not TRITON_INSTALLED:
        return "Triton is not installed"
    if device.type != "cuda" and not INTERPRETED:
        return f"Triton needs a CUDA device and this is {device.type}"
    for leaf in _leaves(values):
        # The dtype of a 0-dim tensor does not matter: kernels load it as float32.
        dtype = leaf.dtype if isinstance(leaf, Tensor) and leaf.dim() else leaf
        if (
            isinstance(dtype, torch.dtype)
            and dtype.is_floating_point
            and dtype not in TRITON_DTYPES
        ):
            return f"the kernels compute in float32, which is not enough for {dtype}"
    return None


def backends(device: torch.device | str) -> dict[str, tuple[str, str]]:
    """For each operator the backend on ``device`` ("triton" or "reference"), and why."""
    problem = why_not_triton(torch.device(device))
    if torch.device(device).type != "cuda" and problem is None:
        problem = "the interpreter of Triton is for tests"
    choice = ("reference", problem) if problem else ("triton", "CUDA device and Triton are here")
    return dict.fromkeys(OPERATORS, choice)
