"""What an exported file says about its network: names and texts, which every format can hold.

They build the network again (``fastadv.run.noted_network``), and say where it comes from and how
robust it is.
"""

from __future__ import annotations

import json

import torch

from fastadv.models import VARIANTS
from fastadv.run import provenance
from fastadv.run.eval_pass import digest_of_weights
from fastadv.run.eval_records import EvalRecords
from fastadv.run.loaded import Run
from fastadv.run.which import WEIGHTS


def notes_of(run: Run) -> dict[str, str]:
    """The notes of the network of ``run``. What is not text is JSON, None is "None"."""
    config, own = run.config, run.built_for
    names = ("model", "width", "depth", *VARIANTS, "normalize", "dropout")
    plain = {name: str(getattr(config, name)) for name in names}
    return plain | {
        "in_channels": str(own.in_channels),
        "num_classes": str(own.num_classes),
        "image_size": json.dumps(own.image_size),
        "mean": json.dumps(own.mean),
        "std": json.dumps(own.std),
        "classes": json.dumps(own.classes),
        "method": config.method,
        "weights": run.which,
        "norm": config.norm,
        "eps": repr(config.eps),
        "accuracies": json.dumps(_accuracies(run)),
        "configuration": provenance.configuration_digest(config),
        "torch": str(torch.__version__),
    }


def _accuracies(run: Run) -> dict[str, dict[str, float]]:
    """Attack -> accuracy in [0,1] on ``n`` test images in the run's ball: those of its end, and
    those of ``fastadv evaluate`` that count more images."""
    found: dict[str, dict[str, float]] = {}
    if run.summary is not None and run.which in WEIGHTS:
        scores, n = run.summary[run.which] or {}, run.summary["n"]
        found = {attack: {"accuracy": score, "n": n} for attack, score in scores.items()}
    weights = digest_of_weights(run.model)
    for record in EvalRecords(run.folder).results():
        same = record.get("weights") == weights and record.get("evaluated_on") == "test images"
        if not same or (record["eps"], record["norm"]) != (run.config.eps, run.config.norm):
            continue
        for attack, score in record.get("accuracy", {}).items():
            if found.get(attack, {"n": 0})["n"] <= record["n"]:
                found[attack] = {"accuracy": score, "n": record["n"]}
    return found
