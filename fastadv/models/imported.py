"""The user's own network, named ``module:callable``."""

import importlib
import inspect
import os
import sys
from collections.abc import Callable, Mapping
from types import ModuleType
from typing import Any

from torch import Tensor, nn

from fastadv.engine.torchvision_shim import import_torchvision
from fastadv.errors import UserError, unknown
from fastadv.models.common import Normalize


def import_model(name: str) -> Callable[..., object]:
    """The network's class or function given by ``name`` = ``module:callable``."""
    return import_callable(name, "model", "a class or function that returns a torch.nn.Module")


def import_callable(name: str, option: str, wanted: str) -> Callable[..., object]:
    """The callable given by ``name`` = ``module:callable`` for the setting ``option``.

    The current directory is searched too, because the ``fastadv`` command does not add it.
    Raises ``UserError`` if it cannot be imported or called; ``wanted``: what should be named.
    """
    module_name, _, attribute = name.partition(":")
    if not module_name or not attribute.isidentifier():
        raise UserError(f"A {option} of your own is written module:callable, not {name!r}.")
    try:
        module = _import_module(module_name)
    except ImportError as error:
        raise UserError(
            f"Cannot import {module_name!r} of --{option} {name} ({error}); run where that module "
            "is, or put its folder on PYTHONPATH."
        ) from error
    if not hasattr(module, attribute):
        public = [key for key, value in vars(module).items() if callable(value) and key[0] != "_"]
        raise unknown(f"callable of {module_name}", attribute, public)
    factory = getattr(module, attribute)
    if not callable(factory):
        raise UserError(f"{name} is a {type(factory).__name__}, not a callable; name {wanted}.")
    return factory


def _import_module(name: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        here = os.getcwd()
        if error.name != name.split(".")[0] or here in sys.path:
            raise
        sys.path.append(here)
        return _import_module(name)
    except RuntimeError as error:
        if "torchvision::" not in str(error):
            raise
        import_torchvision()
        return importlib.import_module(name)


def accepted_options(factory: Callable[..., object]) -> set[str] | None:
    """The keywords ``factory`` accepts, or ``None`` if it accepts any (or has no signature)."""
    try:
        parameters = inspect.signature(factory).parameters.values()
    except ValueError:  # a callable written in C has no signature to read
        return None
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters):
        return None
    named = (inspect.Parameter.KEYWORD_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return {parameter.name for parameter in parameters if parameter.kind in named}


def check_options(name: str, options: Mapping[str, object], accepted: set[str] | None) -> None:
    """Raise ``UserError`` for the first option that model ``name`` does not accept."""
    for key in options:
        if accepted is None or key in accepted:
            continue
        if not accepted:
            raise UserError(f"Model {name} takes no options; omit {key!r}.")
        raise unknown(f"option of model {name}", key, accepted)


def build_imported(
    name: str,
    *,
    data_options: Mapping[str, object],
    options: Mapping[str, object],
    normalize: nn.Module,
) -> nn.Module:
    """Call ``module:callable`` and add the normalisation in front of the returned module.

    ``data_options`` (num_classes, in_channels) are passed if the callable accepts them by name;
    num_classes also if it accepts ``**kwargs``. Raises ``UserError`` if it does not accept one of
    the user's ``options``.
    """
    factory = import_model(name)
    accepted = accepted_options(factory)
    check_options(name, options, accepted)
    known = {"num_classes"} if accepted is None else accepted
    arguments = {**{key: value for key, value in data_options.items() if key in known}, **options}
    try:
        model = factory(**arguments)
    except TypeError as error:
        if not _is_about_the_call(error, arguments):
            raise
        raise UserError(
            f"{name} cannot be called with {', '.join(arguments) or 'no options'} ({error}); wrap "
            "it in a function that takes just these."
        ) from error
    if not isinstance(model, nn.Module):
        raise UserError(f"{name} returned a {type(model).__name__}, not a torch.nn.Module.")
    normalize_first(model, name, normalize)
    return model


def _is_about_the_call(error: TypeError, arguments: Mapping[str, object]) -> bool:
    # True if raised by the call itself or by a call that got its **kwargs. Any other TypeError is a
    # bug inside the callable, whose author needs the traceback.
    by_itself = error.__traceback__ is not None and error.__traceback__.tb_next is None
    unexpected = "unexpected keyword argument" in str(error)
    return by_itself or (unexpected and any(f"'{key}'" in str(error) for key in arguments))


def normalize_first(model: nn.Module, name: str, normalize: nn.Module) -> None:
    """Let ``model``, called ``name``, apply ``normalize`` to its input. It becomes the first layer
    of an ``nn.Sequential`` and a hook of other networks, not a wrapper: parameters keep their
    names, which select blocks and layer groups."""
    if not isinstance(normalize, Normalize):
        return
    if hasattr(model, "normalize"):
        raise UserError(
            f"{name} already has an attribute 'normalize'; if it scales its input itself, omit "
            "mean and std."
        )
    if type(model).forward is nn.Sequential.forward:
        layers = dict(model._modules)
        model._modules.clear()
        model._modules.update({"normalize": normalize, **layers})
        return
    model.add_module("normalize", _InFront(normalize, name))
    model.register_forward_pre_hook(_apply_normalize)


class _InFront(Normalize):
    """``normalize`` in front of the network ``name``, whose own code does not know it."""

    def __init__(self, normalize: Normalize, name: str) -> None:
        nn.Module.__init__(self)
        self.register_buffer("mean", normalize.mean)  # which may be without memory ("meta")
        self.register_buffer("std", normalize.std)
        self._network = name

    def scaled(self, x: Tensor) -> Tensor:
        """``x`` on the scale that the network expects."""
        return super().forward(x)

    def forward(self, x: Tensor) -> Tensor:
        raise UserError(
            f"{self._network} calls every layer it has, and so the one that scales its pixels, "
            "'normalize', a second time: let its forward name its layers, return a plain "
            "nn.Sequential, or omit mean and std (--no-normalize)."
        )


def _apply_normalize(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
    front: Any = module.get_submodule("normalize")
    return (front.scaled(args[0]), *args[1:])
