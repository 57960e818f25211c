"""The sentence about an option that does not exist, with the one that was probably meant."""

from __future__ import annotations

from collections.abc import Mapping
from difflib import get_close_matches

from fastadv.run.spelling import in_dashes

# What other tools call an option -> its name here. Spelling alone would find another.
MEANT: Mapping[str, str] = {
    "--epsilon": "--eps",
    "--radius": "--eps",
    "--learning-rate": "--lr",
    "--lr-max": "--lr",
    "--wd": "--weight-decay",
    "--bs": "--batch-size",
    "--arch": "--model",
    "--network": "--model",
    "--dataset": "--data",
    "--data-dir": "--data-root",
    "--gpu": "--device",
    "--fp16": "--amp",
    "--attack": "--adversary",
    "--loss": "--objective",
    "--num-steps": "--steps",
    "--attack-iters": "--steps",
    "--step-size": "--alpha",
    "--output": "--out",
    "--save-dir": "--out",
    "--lr-schedule": "--schedule",
    "--opt": "--optimizer",
}

# Of the commands that take attacks: what is no option of theirs, and what to write instead. The
# nearest spelling would be another thing (--steps: --eps).
_IN_THE_NAME = "the numbers of an attack follow its name, as in --attacks pgd-50-10."
_NO_OPTION: Mapping[str, str] = {
    "--steps": _IN_THE_NAME,
    "--num-steps": _IN_THE_NAME,
    "--attack-iters": _IN_THE_NAME,
    "--restarts": _IN_THE_NAME,
    "--batch": "the images of a pass are chosen, and change no verdict; omit it.",
    "--batch-size": "the images of a pass are chosen, and change no verdict; omit it.",
    "--time-limit": "evaluate both runs with it first; compare then takes what they stored.",
}


def misspelt(error: Exception) -> str | None:
    """The sentence for an unknown option; None for any other error of the command line."""
    given = getattr(error, "option_name", None)
    context = getattr(error, "ctx", None)
    if given is None or context is None or not hasattr(error, "possibilities"):
        return None
    known = [flag for entry in context.command.params for flag in entry.opts]
    wanted = in_dashes(given)
    if "--attacks" in known and wanted in _NO_OPTION:
        return f"Unknown option {given!r}; {_NO_OPTION[wanted]}"
    near = [MEANT[wanted]] if MEANT.get(wanted) in known else []
    near = near or get_close_matches(wanted, known, n=1, cutoff=0.6)
    hint = f"did you mean {near[0]!r}?" if near else f"`{context.command_path} --help` lists them."
    return f"Unknown option {given!r}; {hint}"
