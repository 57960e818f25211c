"""Sanity of a network's robustness, kept with its evaluations."""

from __future__ import annotations

import datetime
import time

from torch import nn

from fastadv.declared import parse_number
from fastadv.engine.model.precision import shown, tf32
from fastadv.engine.process.determinism import reproducible
from fastadv.engine.process.device import choose_device
from fastadv.errors import UserError
from fastadv.evaluation.sanity.claim import IMAGES, sanity
from fastadv.evaluation.sanity.finding import Report
from fastadv.run.config import RunConfig
from fastadv.run.console import Console
from fastadv.run.eval_pass import EvalJob, settings_of
from fastadv.run.eval_records import EvalRecords
from fastadv.run.run_folder import RunFolder
from fastadv.run.saved_models import load_model
from fastadv.run.source import Source

ATTACK = "sanity"
"""What stands for the attack in the record."""


def check_loaded(
    loaded: tuple[RunConfig, Source, nn.Module],
    folder: RunFolder,
    which: str,
    *,
    eps: str | None = None,
    limit: int | None = None,
    seed: int = 0,
    other: str | None = None,
    console: Console,
) -> Report:
    """``fastadv.sanity`` of what was ``loaded``, whose weights are called ``which``, on ``limit``
    (200) test images, each class in proportion.

    ``eps`` is the configuration's unless given; ``other`` is a run whose best network gives the
    transferred images. The report is a line in the evaluations.jsonl of ``folder``. ``console``
    shows the cost and the progress.
    """
    config, data, model = loaded
    if limit is not None and limit < 1:
        raise UserError(f"--limit must be at least 1, not {limit}.")
    device = choose_device(config.device)
    model = model.to(device)
    images = data.test.limited(IMAGES if limit is None else limit)
    radius = config.eps if eps is None else parse_number(eps, "eps")
    precision = shown(None, model, device)
    another = None
    if other is not None:
        another = load_model(other, data.num_classes, data.channels).to(device)
    records = EvalRecords(folder)
    job = EvalJob(config, data, device, records, which, lasting=True)
    began = time.monotonic()
    title = f"{which}, {config.norm} eps {radius:.4g}, {precision}"
    with reproducible(config.deterministic), tf32(config.tf32):
        with console.checking(title) as (say, tick):
            report = sanity(
                model, images, eps=radius, norm=config.norm, limit=len(images), other=another,
                seed=seed, device=device, say=say, progress=tick,
            )  # fmt: skip
        settings = settings_of(model, images, job)
    records.note(
        {
            "which": which,
            "attack": ATTACK,
            **settings,
            "precision": precision,
            "eps": radius,
            "norm": config.norm,
            "seed": seed,
            "other": other,
            "sanity": report.as_json(),
            "seconds": round(time.monotonic() - began, 3),
            "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        }
    )
    return report
