"""Checks of the outputs themselves: the same for the same image, and logits."""

from __future__ import annotations

import torch

from fastadv.evaluation.probabilities import are_probabilities
from fastadv.evaluation.sanity.finding import Finding
from fastadv.evaluation.sanity.trial import Trial

LARGEST_CHANGE = 0.01  # of the largest logit: above what another batch rounds otherwise


def repeats(trial: Trial) -> Finding:
    """The outputs of an image change neither from call to call nor with the other images of its
    batch."""
    again = torch.empty_like(trial.logits)
    for part in (slice(0, None, 2), slice(1, None, 2)):  # each image among others than before
        if len(trial.x[part]):
            again[part] = trial.seen(trial.x[part])
    change = float((again - trial.logits).abs().amax() / trial.logits.abs().amax().clamp(min=1e-30))
    classes = int((again.argmax(1) != trial.y).sum())
    passed = change <= LARGEST_CHANGE
    sentence = f"outputs of the same images in other batches change by {change:.1g} of the largest"
    if not passed:
        sentence += (
            f", and the class of {classes} of {len(trial)} images; an attack follows noise, so "
            "switch it off, or average it inside the model"
        )
    return Finding("same outputs", passed, sentence, {"change": change, "classes": classes})


def logits(trial: Trial) -> Finding:
    """The model returns logits and not probabilities, whose gradient vanishes once more."""
    passed = not bool(are_probabilities(trial.logits))
    sentence = (
        "the outputs are no probabilities"
        if passed
        else "the outputs are probabilities, whose gradient vanishes where the network is "
        "confident; remove the softmax or sigmoid"
    )
    return Finding("logits", passed, sentence, {})
