"""Augmentations by name, and several of them in a row: ``randaugment+cutmix``."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from fastadv.data.augmented import Augmented, Loader
from fastadv.data.autoaugment import AutoAugmented
from fastadv.data.mixing import KINDS, Mixed
from fastadv.data.random_operations import AugMixed, RandAugmented, TrivialAugmented
from fastadv.data.resized_crop import ResizedCrop
from fastadv.data.rotation import Rotated
from fastadv.errors import UserError, unknown

BASE, CROP, POLICY = "base", "resized-crop", "autoaugment"
_ONE_BY_ONE: Mapping[str, Callable[..., Augmented]] = {
    CROP: ResizedCrop,
    "rotate": Rotated,
    POLICY: AutoAugmented,
    "randaugment": RandAugmented,
    "trivialaugment": TrivialAugmented,
    "augmix": AugMixed,
}
NAMES = (BASE, *_ONE_BY_ONE, *KINDS)
_DOES: Mapping[str, str] = {CROP: "scales", **dict.fromkeys(KINDS, "mixes")}
_GREY_OR_RGB = (POLICY, "randaugment", "trivialaugment", "augmix")


def names_in(text: str) -> tuple[str, ...]:
    """The augmentations beyond crop and flip in ``text``, such as "base+randaugment+cutmix", in the
    order in which they are applied.

    Raises ``UserError`` for unknown ones and for an order that is not possible: resized-crop cuts
    the stored image, and mixed images have no label of their own any more.
    """
    found = [name.strip() for name in text.split("+")]
    for name in found:
        if name not in NAMES:
            raise unknown("augmentation", name, NAMES)
    beyond = [name for name in found if name != BASE]
    if len(set(found)) < len(found):
        raise UserError(f"--augmentation {text} names one twice; name each once.")
    order = sorted(beyond, key=lambda name: (name != CROP) + (name in KINDS))
    if order != beyond:
        raise UserError(
            f"--augmentation applies {CROP} first and mixup and cutmix last: write "
            f"{'+'.join(order)}."
        )
    return tuple(beyond)


def canonical(text: str) -> str:
    """``text`` as it is stored: two texts that mean the same are the same."""
    return "+".join(names_in(text)) or BASE


def mixes(text: str) -> bool:
    """True if images are mixed with each other, so that labels are soft."""
    return any(name in KINDS for name in names_in(text))


def does(text: str) -> str:
    """What the augmentations do to an image, so that stored pixels cannot follow: "turns"; "" for
    crop and flip alone."""
    names = names_in(text)
    return _DOES.get(names[0], "turns") if names else ""


def augmented(
    loader: Loader,
    text: str,
    *,
    seed: int,
    epochs: int,
    channels: int,
    num_classes: int,
    crops_files: bool = False,
) -> Loader:
    """The batches of ``loader`` with the augmentations of ``text``.

    ``autoaugment`` begins in the second half of ``epochs``. ``crops_files``: the loader makes the
    resized crops itself. Raises ``UserError`` for images of other ``channels`` than one takes.
    """
    names = names_in(text)
    for place, name in enumerate(names):
        if name in _GREY_OR_RGB and channels not in (1, 3):
            raise UserError(
                f"--augmentation {name} is for grey or RGB images, not {channels} channels; omit "
                "it."
            )
        if name in KINDS or (name == CROP and crops_files):
            continue
        begins: dict[str, Any] = {"first_epoch": epochs // 2} if name == POLICY else {}
        loader = _ONE_BY_ONE[name](loader, seed=seed, place=place, **begins)
    return _mixed(loader, [name for name in names if name in KINDS], num_classes, seed)


def _mixed(loader: Loader, kinds: Sequence[str], num_classes: int, seed: int) -> Loader:
    return Mixed(loader, kinds, num_classes=num_classes, seed=seed) if kinds else loader
