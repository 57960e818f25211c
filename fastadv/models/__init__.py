"""Networks by name: published architectures with their input normalisation inside."""

from collections.abc import Callable, Sequence
from numbers import Integral
from typing import Any

from torch import nn

from fastadv.declared import Count, ShareBelowOne, coerce
from fastadv.errors import UserError, brief, unknown
from fastadv.models.biased_wide_resnet import wide_resnet34_1
from fastadv.models.common import Normalize, make_normalize
from fastadv.models.densenet import densenet121
from fastadv.models.dla import DLA
from fastadv.models.imported import (
    accepted_options,
    build_imported,
    check_options,
    normalize_first,
)
from fastadv.models.packaged import Size, build_packaged, packaged_library
from fastadv.models.preact_resnet import preact_resnet18
from fastadv.models.resnet import resnet18, resnet50
from fastadv.models.vgg import vgg16
from fastadv.models.wide_resnet import (
    wide_resnet28_10,
    wide_resnet32_10,
    wide_resnet34_10,
)

__all__ = ["MODELS", "VARIANTS", "Normalize", "build_model"]

MODELS: dict[str, Callable[..., nn.Module]] = {
    "preact_resnet18": preact_resnet18,
    "resnet18": resnet18,
    "resnet50": resnet50,
    "wide_resnet28_10": wide_resnet28_10,
    "wide_resnet32_10": wide_resnet32_10,
    "wide_resnet34_10": wide_resnet34_10,
    "wide_resnet34_1": wide_resnet34_1,
    "vgg16": vgg16,
    "densenet121": densenet121,
    "dla": DLA,
}
VARIANTS: dict[str, tuple[str, ...]] = {
    "shortcut": ("preact_resnet18",),
    "stem": ("resnet18", "resnet50"),
}
"""Options in which published networks of the same name differ, and the networks that have them."""

LARGEST_SIZE = 1_000_000
"""Of channels, layers and classes: more than any network has, and a typing mistake ends soon."""
Counts = tuple[int, ...]
Sides = tuple[Count, Count]

_COMMON = {"num_classes", "width", "in_channels", "dropout", "normalize"}


def build_model(
    name: str,
    *,
    num_classes: int = 10,
    width: int | None = None,
    in_channels: int = 3,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    dropout: float = 0.0,
    image_size: Size | None = None,
    **options: object,
) -> nn.Module:
    """The network ``name``: pixels (B,in_channels,H,W) in [0,1] to logits (B,num_classes).

    ``name`` is a key of ``MODELS``, ``timm:NAME`` or ``torchvision:NAME`` for a network of those
    libraries with random weights, or ``module:callable`` for your own network. The callable gets
    ``num_classes`` and ``in_channels`` if it accepts them, and all other given options. A library's
    network gets them all, and ``image_size`` (H,W) if it is built for one size. ``width`` is the
    architecture's size: first-stage channels, a Wide ResNet's widening factor, a DenseNet's growth
    rate; None is the published value. ``mean`` and ``std``, one value per channel for pixels in
    [0,1], become the first layer, ``model.normalize``; None means no normalisation. ``dropout`` is
    the probability of dropout between the two convolutions of each block of a Wide ResNet
    (memorization paper, Table A.1: 0.2), and before the classifier of the others. Options of one
    architecture: ``shortcut`` and ``depths`` (preact_resnet18), ``stem`` (resnet18, resnet50),
    ``depth`` (Wide ResNets). Raises ``UserError`` for an unknown name or option and
    for invalid values.
    """
    if not isinstance(name, str):
        raise UserError(f"The name of a network is a text, not {brief(name)}.")
    _check_count("num_classes", num_classes)
    _check_count("in_channels", in_channels)
    if width is not None:
        _check_count("width", width)
        options["width"] = width
    dropout = coerce("dropout", dropout, ShareBelowOne)
    if image_size is not None:
        image_size = coerce("image_size", image_size, Sides)
    if options.get("depth") is not None:
        _check_count("depth", options["depth"])
    if options.get("depths") is not None:
        for count in coerce("depths", options["depths"], Counts):
            _check_count("depths", count)
    normalize = make_normalize(mean, std, in_channels)
    data_options = {"num_classes": num_classes, "in_channels": in_channels}
    if packaged_library(name):
        model = build_packaged(
            name, **data_options, image_size=image_size, dropout=dropout, options=options
        )
        normalize_first(model, name, normalize)
        return model
    if ":" in name:
        asked = {**options, "dropout": dropout} if dropout else options
        return build_imported(name, data_options=data_options, options=asked, normalize=normalize)
    if name not in MODELS:
        raise unknown("model", name, [*MODELS, "timm:NAME", "torchvision:NAME", "module:callable"])
    factory = MODELS[name]
    specific = {key: value for key, value in options.items() if key != "width"}
    check_options(name, specific, (accepted_options(factory) or set()) - _COMMON)
    return factory(**data_options, dropout=dropout, normalize=normalize, **options)


def _check_count(name: str, value: Any) -> None:
    whole = isinstance(value, Integral) and not isinstance(value, bool)
    if not whole or not 1 <= value <= LARGEST_SIZE:
        raise UserError(
            f"{name} must be an integer from 1 to {LARGEST_SIZE:,}, not {brief(value)}."
        )


def with_option(option: str) -> list[str]:
    """The networks of ``MODELS`` that take ``option``."""
    return [
        name for name, factory in MODELS.items() if option in (accepted_options(factory) or set())
    ]
