"""The optimizers of ``torch.optim`` that a run can take, by name, and the options of each."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from difflib import get_close_matches
from typing import Any

import torch
from torch.optim import Optimizer

from fastadv.declared import parse_number
from fastadv.errors import UserError
from fastadv.run.spelling import as_flag

_REFUSED = {
    "lbfgs": "it evaluates the loss several times in one update, and the attack belongs to one "
    "evaluation",
    "sparseadam": "it takes sparse gradients, and a network's are dense",
    "muon": "it takes weights with two dimensions only, and convolutions have four",
}
OF_THE_RUN = ("params", "lr", "weight_decay", "momentum", "nesterov")
"""Arguments of an optimizer that are settings of a run, where SGD has them."""
_OF_THE_ENGINE = ("foreach", "fused", "capturable", "differentiable", "maximize")


def kinds() -> dict[str, type[Optimizer]]:
    """Lower-case name -> class, of those that a run can take."""
    found = {
        name.lower(): kind
        for name, kind in vars(torch.optim).items()
        if isinstance(kind, type) and issubclass(kind, Optimizer) and kind is not Optimizer
    }
    return {name: found[name] for name in sorted(found) if name not in _REFUSED}


def known(name: str) -> str:
    """``name`` in lower case. Raises ``UserError`` unless it is an optimizer of ``kinds``."""
    wanted, can = name.lower(), kinds()
    if wanted in _REFUSED:
        raise UserError(f"--optimizer {wanted} cannot train here: {_REFUSED[wanted]}.")
    if wanted not in can:
        near = get_close_matches(wanted, can, n=1)
        hint = f"Did you mean {near[0]}? " if near else ""
        raise UserError(f"Unknown optimizer {name!r}. {hint}Choose from: {', '.join(can)}.")
    return wanted


def parameters(name: str) -> Mapping[str, inspect.Parameter]:
    """The arguments of the optimizer's constructor."""
    return inspect.signature(kinds()[name]).parameters


def usual_rate(name: str) -> float:
    """The learning rate that torch gives the optimizer."""
    return float(parameters(name)["lr"].default)


def read_options(name: str, text: str | None) -> dict[str, Any]:
    """The arguments in a text such as ``betas=0.9,0.95;eps=1e-6``, as the optimizer's constructor
    takes them. Raises ``UserError`` for those that it does not have or that are settings of the
    run, and for values of another form than their defaults."""
    found: dict[str, Any] = {}
    for entry in [] if text is None else text.split(";"):
        option, equals, value = (piece.strip() for piece in entry.partition("="))
        if not equals or not option or option in found:
            raise UserError(
                "--optimizer-options are written as name=value, separated by semicolons, such as "
                f"betas=0.9,0.95;eps=1e-6, each name once; not {text!r}."
            )
        found[option] = _value(name, option, value)
    return found


def _value(name: str, option: str, text: str) -> Any:
    its_own = parameters(name)
    if option in OF_THE_RUN and (name == "sgd" or option not in ("momentum", "nesterov")):
        raise UserError(f"{option} is a setting of its own: {as_flag(option)} {text}.")
    if option in _OF_THE_ENGINE:
        raise UserError(f"{option} is chosen by fastadv; leave it out of --optimizer-options.")
    if option not in its_own:
        can = [each for each in its_own if each not in (*OF_THE_RUN, *_OF_THE_ENGINE)]
        raise UserError(
            f"--optimizer {name} has no option {option!r}; it has {', '.join(can) or 'none'}."
        )
    said, usual = f"{option} of --optimizer-options", its_own[option].default
    if isinstance(usual, bool):
        if text.lower() not in ("true", "false"):
            raise UserError(f"{said} must be true or false, not {text!r}.")
        return text.lower() == "true"
    if isinstance(usual, tuple):
        pieces = text.split(",")
        if len(pieces) != len(usual):
            raise UserError(f"{said} takes {len(usual)} numbers such as 0.9,0.95, not {text!r}.")
        return tuple(parse_number(piece.strip(), said) for piece in pieces)
    return parse_number(text, said)


def require_built(
    name: str, text: str | None, *, lr: float, weight_decay: float, **of_sgd: Any
) -> None:
    """Raise ``UserError`` unless the optimizer can be built with these settings and options."""
    arguments = its_arguments(name, text, lr=lr, weight_decay=weight_decay, **of_sgd)
    try:
        kinds()[name]([torch.zeros(1, requires_grad=True)], **arguments)
    except (ValueError, TypeError, RuntimeError) as error:
        raise UserError(f"--optimizer {name} refuses its options: {error}.") from None


def its_arguments(
    name: str, text: str | None, *, lr: float, weight_decay: float, **of_sgd: Any
) -> dict[str, Any]:
    """The arguments of the constructor, without those that only say how it computes.

    Raises ``UserError`` for weight decay where the optimizer has none."""
    arguments: dict[str, Any] = {"lr": lr}
    if "weight_decay" in parameters(name):
        arguments["weight_decay"] = weight_decay
    elif weight_decay:
        raise UserError(f"--optimizer {name} has no weight decay; omit --weight-decay.")
    if name == "sgd":
        arguments |= of_sgd
    return arguments | read_options(name, text)
