"""Which methods can train on images that are mixed with each other (MixUp, CutMix)."""

from __future__ import annotations

from fastadv.algorithms.plan import Plan
from fastadv.data.augmentations import mixes
from fastadv.errors import UserError


def require_mixable(plan: Plan, augmentation: str) -> None:
    """Raise ``UserError`` with the reason if ``augmentation`` mixes images and a part of ``plan``
    does not take the soft labels (``NeedsHardLabels``) or keeps something for each image."""
    if not mixes(augmentation):
        return
    reason = plan.hard_labels_only
    if not reason and plan.keeps_sample_state:
        slot = next(slot for slot, part in plan.parts.items() if part.sample_state())
        reason = (
            f"{slot} {plan.slots[slot]!r} keeps something for each image, and a mixed one is two"
        )
    if not reason and "unlabelled_half" in plan.needs:
        objective = plan.slots["objective"]
        reason = f"objective {objective!r} weighs labelled and pseudo-labelled images apart"
    if reason:
        raise UserError(
            f"--augmentation {augmentation} gives an image the labels of two, and {reason}; omit "
            "mixup and cutmix, or choose another part."
        )
