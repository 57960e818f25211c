"""The logits in what a model returns: a tensor, or a tuple, dictionary or object with them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from fastadv.errors import UserError, brief, unknown

Output = int | str | Callable[[Any], Tensor] | None


def check_output(output: Any) -> Output:
    """``output``; raises ``UserError`` unless it says where in what a model returns its logits
    are: a position, a key or attribute, a function of what is returned, or None."""
    is_place = isinstance(output, (int, str)) and not isinstance(output, bool)
    if output is None or is_place or (callable(output) and not isinstance(output, type)):
        return output
    raise UserError(
        "output says where the logits are in what the model returns: a position such as 0, a name "
        f"such as 'logits', or a function of it, not {brief(output)}."
    )


def logits_in(returned: Any, output: Output) -> Tensor:
    """The logits in what a model ``returned``.

    A function ``output`` is called with it. Otherwise a tensor is taken as it is, since some models
    return a tensor in eval mode and more than that in training. A position or a name is looked up:
    a name among the keys of a mapping, or the attributes of any other object. Without ``output``
    the name "logits" is looked for. Raises ``UserError`` if there is no tensor at that place.
    """
    found: Any
    if callable(output):
        found = output(returned)
    elif isinstance(returned, Tensor):
        found = returned
    elif isinstance(output, int):
        found = _at(returned, output)
    elif isinstance(output, str):
        found = _named(returned, output)
    elif isinstance(returned, Mapping):
        found = returned.get("logits")
    else:
        found = getattr(returned, "logits", None)
    if isinstance(found, Tensor):
        _require_numbers(found)
        return found
    kind = type(returned).__name__
    if output is None:
        raise UserError(
            f"The model must return logits (B,classes), not a {kind}; say where in it they are: "
            "output=0, output='name' or output=function of what the model returns."
        )
    raise UserError(
        f"output={_words(output)} finds a {type(found).__name__} in the {kind} that the model "
        "returns, and logits are a tensor (B,classes)."
    )


def _require_numbers(logits: Tensor) -> None:
    """Raise ``UserError`` unless ``logits`` are dense and of a real floating type."""
    if logits.layout != torch.strided or not logits.is_floating_point():
        raise UserError(
            "The model must return logits as a dense tensor of floating-point numbers, not "
            f"{logits.dtype} in {logits.layout}."
        )


def _at(returned: Any, place: int) -> Any:
    if isinstance(returned, Mapping):  # some objects of transformers are both
        values = list(returned.values())
    elif isinstance(returned, (tuple, list)):
        values = list(returned)
    else:
        raise UserError(
            f"output={place} is a position, and the model returns a {type(returned).__name__}: "
            "pass the name of its logits."
        )
    if not -len(values) <= place < len(values):
        raise UserError(
            f"output={place} is outside of the {len(values)} entries that the model returns."
        )
    return values[place]


def _named(returned: Any, name: str) -> Any:
    if isinstance(returned, Mapping):
        if name not in returned:
            raise unknown("output", name, [str(key) for key in returned])
        return returned[name]
    if not hasattr(returned, name):
        kind = type(returned).__name__
        known = {*getattr(returned, "__dict__", ()), *getattr(returned, "_fields", ())}
        known |= {*getattr(returned, "__dataclass_fields__", ())}
        if known:
            raise unknown("output", name, known)
        raise UserError(f"output={name!r} is a name, and the model returns a {kind} without it.")
    return getattr(returned, name)


def _words(output: Output) -> str:
    return getattr(output, "__name__", None) or repr(output)
