"""What makes an evaluation worthless, noted on the device and told once it is asked for."""

from __future__ import annotations

import torch
from torch import Tensor

from fastadv.errors import NotFiniteError, UserError
from fastadv.evaluation.attacks.inputs import box_sentence
from fastadv.evaluation.search.engine import NOT_FINITE
from fastadv.ranges import labels_outside, outside
from fastadv.threat import Threat

_IMAGES, _LABELS, _OUTPUTS, _ATTACK, _METRIC = range(5)
_NONE = 1 << 62  # no image has this place


class Trouble:
    """Images and labels out of range, and values that are not finite. Only ``raise_found`` waits
    for the device."""

    def __init__(self, threat: Threat, device: torch.device) -> None:
        self._threat = threat
        self._found = torch.zeros(5, dtype=torch.bool, device=device)
        self._first_bad = torch.full((), _NONE, dtype=torch.int64, device=device)
        self._classes = 0

    def look_at_images(self, x: Tensor) -> None:
        """Note images ``x`` (n,...) outside of the threat's range."""
        self._found[_IMAGES] |= outside(x, *self._threat.ends(x))

    def look_at_labels(self, y: Tensor, classes: int) -> None:
        """Note labels ``y`` (n,) or (n,classes) that are none of the network's ``classes``."""
        self._classes = classes
        self._found[_LABELS] |= labels_outside(y, classes)

    def look_at_outputs(self, logits: Tensor, index: Tensor, images: Tensor | None = None) -> None:
        """Note ``logits`` (n,...) of the images ``index`` (n,) that are not finite; or that no
        attack was possible, if what it has made, ``images`` (n,...), is not."""
        bad = ~logits.flatten(1).isfinite().all(1)
        first = torch.where(bad, index, _NONE).amin()
        torch.minimum(self._first_bad, first, out=self._first_bad)
        if images is None:
            self._found[_OUTPUTS] |= first < _NONE
            return
        finite = images.isfinite().all()
        self._found[_OUTPUTS] |= finite & (first < _NONE)
        self._found[_ATTACK] |= ~finite

    def no_attack(self, bad: Tensor) -> None:
        """Note that no attack was possible, if ``bad`` (0-dim bool)."""
        self._found[_ATTACK] |= bad

    def look_at_values(self, values: Tensor) -> None:
        """Note ``values`` (n,) of the metric that are not finite."""
        self._found[_METRIC] |= ~values.isfinite().all()

    def raise_found(self) -> None:
        """Raise the first of what was noted so far, a ``UserError`` or ``NotFiniteError``."""
        found = self._found.tolist()
        if found[_IMAGES]:
            raise UserError(box_sentence(self._threat))
        if found[_LABELS]:
            raise UserError(
                f"Labels are out of range: the model has {self._classes} classes, so labels run "
                f"from 0 to {self._classes - 1}, and soft labels are at least 0 and sum to 1."
            )
        if found[_OUTPUTS]:
            raise NotFiniteError(
                "The model's outputs are not finite, first those of image "
                f"{int(self._first_bad)} (counted from 0), so its accuracy means nothing: look for "
                "weights, statistics or a precision that overflow."
            )
        if found[_ATTACK]:
            raise NotFiniteError(NOT_FINITE)
        if found[_METRIC]:
            raise NotFiniteError("The metric gave a value that is not finite; mend it.")
