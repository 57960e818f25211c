"""The sentence about an option that does not exist, with the one that was probably meant."""

from __future__ import annotations

from collections.abc import Mapping
from difflib import get_close_matches

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
}


def misspelt(error: Exception) -> str | None:
    """The sentence for an unknown option; None for any other error of the command line."""
    given = getattr(error, "option_name", None)
    context = getattr(error, "ctx", None)
    if given is None or context is None or not hasattr(error, "possibilities"):
        return None
    known = [flag for entry in context.command.params for flag in entry.opts]
    wanted = given.replace("_", "-")
    near = [MEANT[wanted]] if MEANT.get(wanted) in known else []
    near = near or get_close_matches(wanted, known, n=1, cutoff=0.6)
    hint = f"did you mean {near[0]!r}?" if near else f"`{context.command_path} --help` lists them."
    return f"Unknown option {given!r}; {hint}"
