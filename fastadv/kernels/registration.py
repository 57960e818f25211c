"""Registration of an entry with ``torch.library``, from its schema.

An entry's schema has one argument per parameter of the reference, in the same order. It may use
three types that torch's schemas do not have; each becomes two arguments of the operator:

- ``float|Tensor a`` and ``int|Tensor a`` (a number or a tensor, 0-dim or with a value per sample):
  ``float a, Tensor? a_tensor``
- ``SymInt h+w`` (a pair of numbers): ``SymInt h, SymInt w``

The function that a compiler traces splits the arguments of the reference by this rule; the
implementation and the fake join them again. Eager calls do not use any of this.
"""

import inspect
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .reference_crop import default_dtype

NAMESPACE = "fastadv"
LIBRARY = torch.library.Library(NAMESPACE, "FRAGMENT")

Fake = Callable[..., Tensor | tuple[Tensor, ...]]


@dataclass(frozen=True)
class Autograd:
    """The gradient of a registered operator, which returns its result first and then what its
    backward pass needs.

    ``forward`` takes the parameters of the reference and returns all of these; its Triton launcher
    has the same name. ``setup_context`` and ``backward`` are passed to
    ``torch.library.register_autograd``.
    """

    forward: Callable[..., tuple[Tensor, ...]]
    setup_context: Callable[..., None]
    backward: Callable[..., Any]


def register(
    reference: Callable[..., Any],
    schema: str,
    run: Callable[..., Any],
    like: str,
    fake: Fake | None,
    autograd: Autograd | None,
) -> Callable[..., Any]:
    """Register the operator under the name of ``reference``; return the function a compiler traces.

    ``run`` and ``fake`` take the parameters of the reference by keyword. ``run`` computes the
    results. Their shapes, dtypes and memory layouts are those of the parameter named ``like``, or
    those of the empty tensors that ``fake`` returns; an operator without results needs neither.
    """
    name, parameters = reference.__name__, inspect.signature(reference).parameters
    names = tuple(parameters)
    defaults = {n: p.default for n, p in parameters.items() if p.default is not p.empty}
    arguments, results = schema[1:].split(") -> ")
    kinds, declared = zip(*map(_declared, arguments.split(", ")), strict=True)
    count = 0 if results == "()" else results.count("Tensor")

    def joined(pieces: Sequence[Any]) -> dict[str, Any]:
        rest = iter(pieces)
        return {name: _join(kind, rest) for name, kind in zip(names, kinds, strict=True)}

    def implementation(*pieces: Any) -> Any:
        values = joined(pieces)
        found = run(**values)
        if not like:
            return found
        if count == 1:
            return _laid_out_as(found, values[like])
        return tuple(_laid_out_as(each, values[like]) for each in found)

    def promised(*pieces: Any) -> Any:
        values = joined(pieces)
        if not count:
            return None
        if fake is not None:
            return fake(**values)
        made = tuple(torch.empty_like(values[like]) for _ in range(count))
        return made[0] if count == 1 else made

    LIBRARY.define(f"{name}({', '.join(declared)}) -> {results}")
    for key in ("CPU", "CUDA"):
        LIBRARY.impl(name, implementation, key)
    torch.library.register_fake(f"{NAMESPACE}::{name}", promised, lib=LIBRARY)
    if autograd is not None:
        torch.library.register_autograd(
            f"{NAMESPACE}::{name}",
            autograd.backward,
            setup_context=autograd.setup_context,
            lib=LIBRARY,
        )
    registered = getattr(torch.ops.fastadv, name)

    def traced(*args: Any, **kwargs: Any) -> Any:
        missing = names[len(args) :]
        values = [*args, *[kwargs[n] if n in kwargs else defaults[n] for n in missing]]
        pieces: list[Any] = []
        for kind, value in zip(kinds, values, strict=True):
            pieces += _split(kind, value, values[0])
        found = registered(*pieces)
        return found if autograd is None else found[0]

    # Without a formula for its gradient an operator must not be recorded by autograd.
    return traced if autograd is not None else torch.no_grad()(traced)


def _declared(argument: str) -> tuple[str, str]:
    """(kind, the arguments in torch) of one argument of an entry's schema."""
    kind, name = argument.rsplit(" ", 1)
    if kind.endswith("|Tensor"):
        return kind, f"{kind.removesuffix('|Tensor')} {name}, Tensor? {name}_tensor"
    if "+" in name:
        return "pair", ", ".join(f"{kind} {part}" for part in name.split("+"))
    return kind, argument


def _split(kind: str, value: Any, first: Any) -> list[Any]:
    """One argument of the reference as the arguments that the registered operator takes."""
    if kind == "float|Tensor":
        return [0.0, value] if isinstance(value, Tensor) else [float(value), None]
    if kind == "int|Tensor":
        # An int of a schema has 64 bits with a sign; a seed uses all 64 without one.
        wrapped = 0 if isinstance(value, Tensor) else (value + 2**63) % 2**64 - 2**63
        return [wrapped, value if isinstance(value, Tensor) else None]
    if kind == "ScalarType":
        return [default_dtype(first) if value is None else value]
    if kind == "pair" or kind.endswith("[]"):
        return list(value) if kind == "pair" else [list(value)]
    return [value]


def _join(kind: str, pieces: Iterator[Any]) -> Any:
    """The inverse of :func:`_split`."""
    value = next(pieces)
    if kind.endswith("|Tensor"):
        tensor = next(pieces)
        return value if tensor is None else tensor
    return (value, next(pieces)) if kind == "pair" else value


def _laid_out_as(result: Tensor, model: Tensor) -> Tensor:
    """``result`` in the layout that the fake promises."""
    if result.stride() == torch.empty_like(model, device="meta").stride():
        return result
    return torch.empty_like(model, dtype=result.dtype).copy_(result)
