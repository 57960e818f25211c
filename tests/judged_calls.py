"""What became of a call of the Python API: a good result, one sentence, or a fault."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

import fastadv
from fastadv.errors import TrainingError, UserError

SLOW = 30.0  # seconds; a call that takes longer is called a hang
SENTENCE = 1200  # the most characters of one sentence


class Outcome(NamedTuple):
    """``kind``: "good", "refused" or "wrong"."""

    kind: str
    said: str


def outcome(run: Callable[[], str]) -> Outcome:
    """Make a call, which returns what is wrong with its result, or ""."""
    torch.manual_seed(0)
    began = time.monotonic()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            fault = run()
    except (UserError, TrainingError) as error:
        sentence = str(error)
        told = bool(sentence) and len(sentence) <= SENTENCE and "\n" not in sentence.strip()
        found = Outcome("refused" if told else "wrong", f"{type(error).__name__}: {sentence}")
    except TypeError as error:
        # What Python itself says of a call without an argument, or with an unknown one.
        python = "positional argument" in str(error) or "keyword argument" in str(error)
        found = Outcome("refused" if python else "wrong", f"TypeError: {error}")
    except ValueError as error:
        own = str(error) == "of the network's own"
        found = Outcome("refused" if own else "wrong", f"{type(error).__name__}: {error}")
    except Exception as error:
        found = Outcome("wrong", f"{type(error).__name__}: {error}")
    else:
        found = Outcome("wrong", fault) if fault else Outcome("good", "")
    seconds = time.monotonic() - began
    return found if seconds < SLOW else Outcome("wrong", f"took {seconds:.0f} s: {found.said}")


def fault_of_step(step: fastadv.Step, found: Any) -> str:
    if not isinstance(found, dict) or not {"loss"} <= found.keys():
        return f"returned {found!r}"
    if not step.healthy():
        return ""  # check() tells it
    for name, value in found.items():
        if not bool(value.isfinite()):
            return f"{name} is {float(value)}, and the step says it is healthy"
    if "accuracy" in found and not 0 <= float(found["accuracy"]) <= 1:
        return f"accuracy is {float(found['accuracy'])}"
    for name, weight in step.model.named_parameters():
        if not bool(weight.isfinite().all()):
            return f"{name} is not finite, and the step says it is healthy"
    return ""
