"""A network of an installed library, named ``timm:NAME`` or ``torchvision:NAME``.

The libraries are installed packages, so their code is trusted like torch's.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable, Iterable, Mapping
from importlib.metadata import version
from typing import Any, NamedTuple

import torch
from torch import nn

from fastadv.engine.model.guard import train_flags
from fastadv.engine.model.untouched import untouched
from fastadv.engine.torchvision_shim import import_torchvision
from fastadv.errors import UserError, unknown

Size = tuple[int, int]
Options = dict[str, Any]
EXAMPLES = ("convnext_tiny", "efficientnet_b0", "resnet18")  # named alike in both libraries


class Library(NamedTuple):
    """How the networks of a library are made.

    ``names()`` are the networks there are, ``create(name, **options)`` makes one with random
    weights. ``channels`` and ``dropout`` are the names of its options; ``channels`` is None if all
    networks take three. ``sized(size)`` are the options that may tell a network the size (H,W) of
    the images; each network takes at most one of them.
    """

    names: Callable[[], Iterable[str]]
    create: Callable[..., nn.Module]
    channels: str | None
    dropout: str
    sized: Callable[[Size], list[Options]]


def packaged_library(name: str) -> str | None:
    """The library of the network ``name`` if it is written ``timm:NAME`` or ``torchvision:NAME``,
    otherwise None."""
    library, colon, _ = name.partition(":")
    return library if colon and library in LIBRARIES else None


def names_own_code(name: str) -> bool:
    """True if the network ``name`` is a ``module:callable``, whose code is the user's own."""
    return ":" in name and packaged_library(name) is None


def library_version(name: str) -> str:
    """The library of the network ``name``, with its version: ``"timm 1.0.31"``."""
    library = name.partition(":")[0]
    return f"{library} {version(library)}"


def build_packaged(
    name: str,
    *,
    num_classes: int,
    in_channels: int,
    image_size: Size | None,
    dropout: float,
    options: Mapping[str, object],
) -> nn.Module:
    """The network ``name`` with random weights: (B,in_channels,H,W) to logits (B,num_classes).

    ``image_size`` (H,W) is given to the networks that take it, such as vision transformers, and
    tried with a pass of two images; None: their own size. ``dropout`` above 0 and ``options`` are
    given to the network. Raises ``UserError`` if the library is not installed, for an unknown name,
    and if the network cannot be built so or does not take images of this size.
    """
    kind, _, wanted = name.partition(":")
    _require_installed(kind)
    library = LIBRARIES[kind]
    _require_known(kind, wanted, library.names())
    given: Options = {"num_classes": num_classes, **options}
    if library.channels is not None:
        given[library.channels] = in_channels
    elif in_channels != 3:
        raise UserError(
            f"The networks of {kind} take images of 3 channels, not {in_channels}; choose one of "
            "timm or of fastadv."
        )
    if dropout:
        given[library.dropout] = dropout
    model = _created(library, name, given, [] if image_size is None else library.sized(image_size))
    if image_size is not None:
        _require_fit(model, name, (2, in_channels, *image_size))
    return model


def _created(library: Library, name: str, given: Options, sized: list[Options]) -> nn.Module:
    draws = torch.get_rng_state()
    for size in [*sized, {}]:
        torch.set_rng_state(draws)  # an attempt that failed may have drawn weights
        try:
            return library.create(name.partition(":")[2], **given, **size)
        except Exception as error:
            if size and isinstance(error, TypeError):
                continue  # a network without this option
            about = ", ".join(f"{key}={value}" for key, value in {**given, **size}.items())
            raise UserError(
                f"{name} cannot be built with {about} ({_reason(error)}); choose another network "
                "or other options."
            ) from error
    raise RuntimeError("the last attempt returns or raises")


def _require_fit(model: nn.Module, name: str, shape: tuple[int, ...]) -> None:
    if next(model.parameters()).is_meta:
        return
    try:
        with torch.no_grad(), train_flags(model, False), untouched(model):
            model(torch.zeros(shape))
    except Exception as error:
        height, width = shape[-2:]
        raise UserError(
            f"{name} does not take images of {height}x{width} pixels ({_reason(error)}); choose "
            "another network, or larger images."
        ) from error


def _reason(error: Exception) -> str:
    return " ".join(str(error).split()).rstrip(".") or type(error).__name__


def _require_installed(library: str) -> None:
    if importlib.util.find_spec(library) is None:
        raise UserError(
            f"Networks named {library}:NAME need {library}, which is not installed; run "
            f"`pip install {library}`."
        )


def _require_known(library: str, name: str, known: Iterable[str]) -> None:
    names = set(known)
    if name in names:
        return
    bare = name.partition(".")[0]
    if bare in names:
        raise UserError(
            f"{name} names pretrained weights of {library}, and training starts from random ones; "
            f"write {library}:{bare}."
        )
    raise unknown(f"network of {library}", name, names, EXAMPLES)


def _timm() -> Any:
    import_torchvision()  # timm imports it
    return importlib.import_module("timm")


def _of_timm(name: str, **options: Any) -> nn.Module:
    return _timm().create_model(name, pretrained=False, **options)


def _torchvision_names() -> list[str]:
    models = import_torchvision().models
    return models.list_models(module=models)


def _of_torchvision(name: str, **options: Any) -> nn.Module:
    return import_torchvision().models.get_model(name, weights=None, **options)


def _sized_in_torchvision(size: Size) -> list[Options]:
    square: list[Options] = [{"image_size": size[0]}] if size[0] == size[1] else []
    return [*square, {"input_size": size}]


LIBRARIES = {
    "timm": Library(
        names=lambda: _timm().list_models(),
        create=_of_timm,
        channels="in_chans",
        dropout="drop_rate",
        sized=lambda size: [{"img_size": size}],
    ),
    "torchvision": Library(
        names=_torchvision_names,
        create=_of_torchvision,
        channels=None,
        dropout="dropout",
        sized=_sized_in_torchvision,
    ),
}
