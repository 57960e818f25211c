"""Check that adversarial images survive being written to a file of 8 bits."""

from __future__ import annotations

from fastadv.evaluation.sanity import strength
from fastadv.evaluation.sanity.chance import counted, is_above
from fastadv.evaluation.sanity.finding import Finding
from fastadv.evaluation.sanity.trial import Trial

LEVELS = 255
UNDONE = 0.05  # the share of adversarial images that rounding may undo


def survives(trial: Trial) -> Finding:
    """Rounded to 8 bits, what PGD has found still fools the network."""
    found = strength.longest(trial)
    low, high = trial.threat.ends(trial.x)
    level = (high - low) / LEVELS
    fooled = (~found.right).nonzero().squeeze(1)
    moved = (found.x - trial.x).abs() / level
    if len(fooled) == 0:
        sentence = f"{strength.LONGEST} fools no image, so there is nothing to round"
        return Finding("8 bits", None, sentence, {"of": 0})
    if float(moved[fooled].mean()) < 1:
        sentence = "the perturbations are below a level of 8 bits in the mean, and rounding is not"
        return Finding("8 bits", None, sentence, {"of": len(fooled)})
    rounded = low + ((found.x[fooled] - low) / level).round() * level
    undone = int(trial.judged(rounded, trial.y[fooled]).right.sum())
    passed = not is_above(undone, len(fooled), UNDONE)
    sentence = (
        f"rounding to 8 bits undoes the adversarial image for {counted(undone, len(fooled))} that "
        f"{strength.LONGEST} fools"
    )
    if not passed:
        sentence += "; they are no images that could be in a file"
    return Finding("8 bits", passed, sentence, {"undone": undone, "of": len(fooled)})
