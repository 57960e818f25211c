"""``fastadv.sanity``: checks whether a robust number can be believed."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from fastadv.declared import coerce
from fastadv.engine.model.outputs import Output
from fastadv.errors import NotFiniteError, UserError
from fastadv.evaluation.attacks import inputs, threat_of
from fastadv.evaluation.sanity.checks import CHECKS, MOST_PASSES, TIMED, TIMED_PASSES
from fastadv.evaluation.sanity.finding import Report
from fastadv.evaluation.sanity.trial import Trial, logits_of
from fastadv.ranges import outside, require_labels, require_logits
from fastadv.threat import Threat

IMAGES = 200
PGD_200 = 600  # passes


def sanity(
    model: nn.Module,
    batches: Iterable[tuple[Tensor, Tensor]],
    *,
    eps: float | str | None = None,
    norm: str = "linf",
    threat: Threat | None = None,
    limit: int = IMAGES,
    other: nn.Module | None = None,
    seed: int = 0,
    amp: bool | str = False,
    device: torch.device | str | None = None,
    output: Output = None,
    say: Callable[[str], None] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Report:
    """Checks on the first ``limit`` images whether attacks on ``model`` can work or its gradient is
    masked (Athalye et al., 2018; Carlini et al., 2019), so that a robust accuracy means nothing.

    Returns a ``Report``: ``passed``, and ``findings`` with a sentence each; ``str(report)`` is all
    of it. Checked are: outputs that change from call to call; probabilities in place of logits;
    gradients that are exactly zero; a loss that is exactly zero after PGD-50; the gradient against
    finite differences; FGSM, PGD-10 and PGD-50 against each other; PGD in larger balls, of which
    the largest leaves no image; Square, random points and transferred adversarial images against
    PGD-50 and APGD-DLR together; adversarial images rounded to 8 bits. A check fails only if its
    count is more than chance, as the intervals in its sentence say.

    ``batches`` yields (x, y), ``x`` (B,C,H,W) float in [0,1] and ``y`` (B,) classes; ``eps``,
    ``norm``, ``threat``, ``amp``, ``device`` and ``output`` are those of ``fastadv.evaluate``.
    ``other`` is a network whose adversarial images are tried (None: a small one, trained on the
    answers of ``model``). The cost is below that of PGD-200: ``say`` receives one sentence about
    it before the attacks, and ``progress(done, total)`` is called with numbers of passes.

    Raises ``UserError`` for a threat with a mask, targets or an eps for each image, an eps of 0,
    labels or images out of range, and if no image is classified correctly;
    ``NotFiniteError`` for outputs or gradients that are not finite.
    """
    threat = _checked_threat(threat_of(threat, norm, eps))
    seed, limit = coerce("seed", seed, int), coerce("limit", limit, int)
    if limit < 1:
        raise UserError(f"limit must be at least 1, not {limit}.")
    x, y, batch = _first(batches, limit)
    where = inputs.model_device(model, x.device) if device is None else inputs.device_called(device)
    net = inputs.attacked_network(model, where, amp, output)
    x, y = x.to(where), y.to(where, torch.int64)
    logits = _checked_logits(logits_of(net, x, batch), x, y, threat)
    right = (logits.argmax(1) == y).nonzero().squeeze(1)
    if len(right) == 0:
        raise UserError(
            f"The model classifies none of {len(x)} images correctly, so there is no robustness to "
            "check: load trained weights, or check labels and scaling."
        )
    total = MOST_PASSES * len(right)
    trial = Trial(
        model, net, threat, x[right], y[right], right, logits[right],
        total=len(x), batch=batch, seed=seed, amp=amp, output=output, other=other,
        progress=lambda spent: None if progress is None else progress(spent, total),
    )  # fmt: skip
    if say is not None:
        say(_cost(trial))
    with warnings.catch_warnings():
        # Each attack would warn, on each batch, of what the report says once.
        warnings.simplefilter("ignore", UserWarning)
        findings = tuple(check.run(trial) for check in CHECKS)
    return Report(findings, len(x), len(trial), int(trial.standing.sum()), trial.spent / len(trial))


def _checked_threat(threat: Threat) -> Threat:
    if threat.targeted or threat.mask is not None:
        raise UserError(
            "sanity checks attacks on whole images that change the class; give a threat without "
            "mask or targets."
        )
    if threat.by_channel:
        raise UserError(
            "sanity takes one eps and one range for all channels; put the normalisation into the "
            "model, and check it on images in [0, 1]."
        )
    if isinstance(threat.eps, Tensor):
        if threat.eps.dim():
            raise UserError("sanity takes one eps for all images.")
        threat = threat.with_eps(float(threat.eps))
    if threat.nominal == 0:
        raise UserError("eps is 0, so there is no attack to check: give a radius in pixels.")
    return threat


def _first(batches: Iterable[tuple[Tensor, Tensor]], limit: int) -> tuple[Tensor, Tensor, int]:
    """The first ``limit`` images with their labels, and the size of the largest batch."""
    xs: list[Tensor] = []
    ys: list[Tensor] = []
    for pair in batches:
        if not isinstance(pair, (tuple, list)) or len(pair) != 2:
            raise UserError("Batches to check must be pairs (images, labels).")
        x, y = pair
        inputs.check_batch(x, y)
        if y.dim() != 1 or x.dim() != 4:
            raise UserError("sanity checks images (B,C,H,W) with one class each, y (B,).")
        left = limit - sum(map(len, xs))
        xs.append(inputs.plain(x)[:left])
        ys.append(inputs.plain(y)[:left])
        if len(x) >= left:
            break
    if not sum(map(len, xs)):
        raise UserError("There are no images to check: the batches are empty.")
    return torch.cat(xs), torch.cat(ys), max(map(len, xs))


def _checked_logits(logits: Tensor, x: Tensor, y: Tensor, threat: Threat) -> Tensor:
    require_logits(logits)
    if outside(x, *threat.ends(x)):
        raise UserError(inputs.box_sentence(threat))
    require_labels(y, logits.shape[1])
    if not logits.isfinite().all():
        raise NotFiniteError(
            "The model's outputs are not finite, so its accuracy means nothing: look for weights, "
            "statistics or a precision that overflow."
        )
    return logits


def _cost(trial: Trial) -> str:
    """What the checks cost at most, from the time of a short attack."""
    began = time.perf_counter()
    trial.attacked(TIMED, TIMED_PASSES).right.any().item()  # waits for the device
    seconds = (time.perf_counter() - began) * MOST_PASSES / (TIMED_PASSES + 1)
    return (
        f"checking {len(trial)} correctly classified of {trial.total} images: at most "
        f"{MOST_PASSES} forward passes each (PGD-200: {PGD_200}), about {seconds:.0f} s"
    )
