"""AutoAttack by its canonical package, ``pyautoattack``, unchanged: what our searches are compared
with.

The package draws its random numbers for a whole batch, so here the result of an image depends on
its batch, and it holds all images. It computes in float32.
"""

from __future__ import annotations

import importlib.util
import logging
import re
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fastadv.engine.model.outputs import Output
from fastadv.errors import UserError
from fastadv.evaluation.attacks import inputs
from fastadv.evaluation.attacks.names import AttackSpec, parse_attack
from fastadv.evaluation.search.catalogue import CASCADES, SEARCHES
from fastadv.threat import Threat

NORMS = {"linf": "Linf", "l2": "L2"}
CANONICAL = ("apgd-ce", "apgd-dlr", "apgd-t", "fab", "fab-t", "square")
LEAST_CLASSES = 4
TARGETS = 9


@dataclass(frozen=True)
class Canonical:
    """Verdicts of the canonical package on N images, in the order of the batches.

    ``stages``: "clean", then the attacks that were run. ``fooled_by`` (N,) int16: the stage that
    fooled the image, -1 where none did. ``remarks``: the package's own warnings. ``seconds``: what
    its attacks took.
    """

    stages: tuple[str, ...]
    fooled_by: Tensor
    remarks: tuple[str, ...]
    seconds: float

    @property
    def accuracies(self) -> dict[str, float]:
        """The robust accuracy in [0,1] after each stage."""
        return accuracies(self.stages, self.fooled_by)


def accuracies(stages: Sequence[str], fooled_by: Tensor) -> dict[str, float]:
    """The share of images in [0,1] that are right after each of ``stages``; ``fooled_by`` (N,):
    the number of the stage that fooled an image, or -1."""
    n = len(fooled_by)
    return {
        stage: int(((fooled_by < 0) | (fooled_by > number)).sum()) / n
        for number, stage in enumerate(stages)
    }


def require_package() -> None:
    """Raise ``UserError`` with the install command if ``pyautoattack`` is missing."""
    if importlib.util.find_spec("pyautoattack") is None:
        raise UserError(
            "--reference needs the package pyautoattack; install it with: pip install "
            "'fastadv[eval]'"
        )


def attacks_of(name: str) -> list[AttackSpec]:
    """The attacks in ``name`` that the canonical package knows as well: a version of AutoAttack,
    or one or several of its attacks joined by "+". Raises ``UserError`` for others."""
    spec = parse_attack(name)
    parts = list(spec.searches)
    settled = name.strip().lower() in CASCADES or all(
        part.steps is None and part.restarts is None for part in parts
    )
    if not parts or not settled or any(part.kind not in CANONICAL for part in parts):
        raise UserError(
            f"The canonical package has no {name!r}: --reference compares {', '.join(CASCADES)}, "
            f"and {', '.join(CANONICAL)} without numbers, alone or joined by '+'."
        )
    return parts


def require_its_threat(threat: Threat) -> None:
    """Raise ``UserError`` unless ``threat`` is what the package computes: one radius for all images
    and channels, in [0,1], without a mask or targets."""
    eps = threat.eps
    one_radius = not isinstance(eps, tuple) and not (isinstance(eps, Tensor) and eps.dim())
    if not one_radius or (threat.low, threat.high) != (0, 1):
        what = "one eps for all images and channels, and images in [0, 1]"
    elif threat.mask is not None or threat.targeted:
        what = "neither masks nor targets"
    else:
        return
    raise UserError(f"The canonical AutoAttack takes {what}; evaluate without --reference.")


def canonical(
    model: nn.Module,
    batches: Iterable[tuple[Tensor, Tensor]],
    attack: str = "autoattack",
    *,
    threat: Threat,
    seed: int = 0,
    output: Output = None,
) -> Canonical:
    """The verdicts of the canonical package under ``attack`` (``attacks_of``) on ``batches`` of
    images (B,C,H,W) in [0,1] with classes (B,); it takes them in batches of the first one's size.

    With fewer than ten classes every wrong class is a target, instead of nine. Raises ``UserError``
    for a missing package, for attacks and threats that it does not have, for no images, and for
    fewer than four classes, because its targeted losses need four.
    """
    require_package()
    require_its_threat(threat)
    parts = attacks_of(attack)
    x, y, size = _joined(batches)
    device = inputs.model_device(model, x.device)
    net = inputs.attacked_network(model, device, amp=False, output=output)

    def logits(images: Tensor) -> Tensor:
        return net.logits(images.to(x.dtype)).float()

    with torch.inference_mode(False), net.attacking("eval"), _contained(device):
        with torch.no_grad():
            classes = logits(x[:1].to(device)).shape[1]
        if classes < LEAST_CLASSES:
            raise UserError(
                f"The canonical AutoAttack needs at least {LEAST_CLASSES} classes and the model "
                f"has {classes}; evaluate without --reference."
            )
        adversary = _adversary(logits, device, threat, seed, attack, parts, classes)
        with _heard() as remarks:
            begun = time.perf_counter()
            fooled_by = _cascade(adversary, parts, x.float(), y, size)
            seconds = time.perf_counter() - begun
    stages = ("clean", *(part.kind for part in parts))
    _check_square(stages, fooled_by, remarks)
    return Canonical(stages, fooled_by, _first_of_each(remarks), seconds)


def _joined(batches: Iterable[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor, int]:
    """All images, all labels, and the number of images of the first batch."""
    pairs = [(x, y) for x, y in batches if len(x)]
    if not pairs:
        raise UserError("There are no images to evaluate: the batches are empty.")
    for x, y in pairs:
        inputs.check_batch(x, y)
        if y.is_floating_point():
            raise UserError("The canonical AutoAttack needs one class for each image.")
    images, labels = (torch.cat([pair[part].cpu() for pair in pairs]) for part in (0, 1))
    return images, labels.long(), len(pairs[0][0])


def _adversary(
    model: Any,
    device: torch.device,
    threat: Threat,
    seed: int,
    attack: str,
    parts: Sequence[AttackSpec],
    classes: int,
) -> Any:
    """The package's object with the published settings."""
    from pyautoattack import AutoAttack  # an optional package

    version = {"autoattack-plus": "plus", "autoattack-rand": "rand"}.get(attack.strip().lower())
    adversary = AutoAttack(
        model, device=device, eps=float(threat.eps), norm=NORMS[threat.norm], seed=seed,
        version=version or "standard",
    )  # fmt: skip
    targets = min(TARGETS, classes - 1)
    adversary.apgd_targeted.n_target_classes = targets
    adversary.fab.n_target_classes = targets
    if version is None and "fab" in {part.kind for part in parts}:
        adversary.fab.n_restarts = SEARCHES["fab"].default_segments
    return adversary


def _cascade(
    adversary: Any, parts: Sequence[AttackSpec], x: Tensor, y: Tensor, size: int
) -> Tensor:
    """The number of the stage that fooled each image, (N,) int16, or -1.

    One attack after the other on the images that are left, which is what the package does with a
    list of attacks: each attack seeds the generators anew in each of its batches.
    """
    device = adversary.device
    with torch.no_grad():
        predicted = [
            adversary.get_logits(part.to(device)).argmax(1).cpu() for part in x.split(size)
        ]
    fooled_by = torch.where(torch.cat(predicted) == y, -1, 0).to(torch.int16)
    for number, part in enumerate(parts, 1):
        left = (fooled_by < 0).nonzero().squeeze(1)
        if not len(left):
            break
        adversary.attacks_to_run = [part.kind]
        _, found = adversary.run_standard_evaluation(x[left], y[left], batch_size=size)
        fooled_by[left[found.cpu() != y[left]]] = number
    return fooled_by


def _check_square(stages: Sequence[str], fooled_by: Tensor, remarks: list[str]) -> None:
    """Add the package's remark on a Square attack that is stronger than the attacks before it."""
    from pyautoattack import checks

    with _heard() as found:
        checks.check_square_sr(accuracies(stages, fooled_by), logger=logging.getLogger(LOGGER))
    remarks += found


def _first_of_each(remarks: Sequence[str]) -> tuple[str, ...]:
    """``remarks`` without those that differ from an earlier one in their numbers alone."""
    kinds: dict[str, str] = {}
    for remark in remarks:
        kinds.setdefault(re.sub(r"\d+", "", remark), remark)
    return tuple(kinds.values())


LOGGER = "auto-attack"


@contextmanager
def _heard() -> Iterator[list[str]]:
    """The warnings that the package logs within this context; they go nowhere else."""
    heard: list[str] = []

    class Heard(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            heard.append(record.getMessage())

    logger, handler = logging.getLogger(LOGGER), Heard(logging.WARNING)
    propagates = logger.propagate
    logger.addHandler(handler)
    logger.propagate = False
    try:
        yield heard
    finally:
        logger.propagate = propagates
        logger.removeHandler(handler)


@contextmanager
def _contained(device: torch.device) -> Iterator[None]:
    """Restore what the package changes process-wide: the random seeds and the trace function."""
    tracing = sys.gettrace()
    cuda = [device] if device.type == "cuda" else []
    try:
        with torch.random.fork_rng(devices=cuda):
            yield
    finally:
        sys.settrace(tracing)
