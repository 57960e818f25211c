"""Sanity of a finished run's robustness, kept with its evaluations."""

from __future__ import annotations

import datetime
import time
from collections.abc import Callable

from fastadv.declared import parse_number
from fastadv.engine.model.precision import shown, tf32
from fastadv.engine.process.determinism import reproducible
from fastadv.engine.process.device import choose_device
from fastadv.errors import UserError
from fastadv.evaluation.sanity.claim import IMAGES, sanity
from fastadv.evaluation.sanity.finding import Report
from fastadv.run.console import Console
from fastadv.run.eval_pass import EvalJob, settings_of
from fastadv.run.eval_records import EvalRecords
from fastadv.run.finished import load_run
from fastadv.run.run_folder import RunFolder
from fastadv.run.saved_models import load_model

ATTACK = "sanity"


def check_run(
    path: str,
    *,
    which: str = "best",
    eps: str | None = None,
    limit: int | None = None,
    seed: int = 0,
    other: str | None = None,
    console: Console | None = None,
) -> Report:
    """``fastadv.sanity`` of the run in ``path`` on ``limit`` (200) of its test images, each class in
    proportion; ``eps`` is the run's unless given, and ``other`` a run whose best network is that of
    the transferred images.

    The report is a line in the folder's evaluations.jsonl. ``console`` shows the cost and progress.
    """
    if limit is not None and limit < 1:
        raise UserError(f"--limit must be at least 1, not {limit}.")
    config, data, model = load_run(path, which)
    device = choose_device(config.device)
    images = data.test.limited(IMAGES if limit is None else limit)
    radius = config.eps if eps is None else parse_number(eps, "eps")
    another = None
    if other is not None:
        another = load_model(other, data.num_classes, data.channels).to(device)
    records = EvalRecords(RunFolder.open(path))
    job = EvalJob(config, data, device, records, f"{which} weights", "test images", lasting=True)
    job.console = console or job.console
    began = time.monotonic()
    title = f"checking the sanity of {job.which}: {config.norm} eps {radius:.4g}"
    model = model.to(device)
    with reproducible(config.deterministic), tf32(config.tf32):
        with job.console.evaluating(title, "passes", 0, 1) as tick:
            report = sanity(
                model, images, eps=radius, norm=config.norm, limit=len(images), other=another,
                seed=seed, device=device, say=job.console.say, progress=tick,
            )  # fmt: skip
        settings = settings_of(model, images, job)
    records.add(
        {
            "which": job.which,
            "attack": ATTACK,
            **settings,
            "precision": shown(None, model, device),
            "eps": radius,
            "norm": config.norm,
            "seed": seed,
            "other": other,
            "images": report.n,
            "sanity": report.as_json(),
            "seconds": round(time.monotonic() - began, 3),
            "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        }
    )
    return report
