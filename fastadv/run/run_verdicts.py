"""The verdicts on the test images of a run: from their file in the run folder, or new ones.

RUN/verdicts/ATTACK-DIGEST.npz, where DIGEST is that of everything the verdicts depend on, so that
each evaluation has its own file. A file is used only if it is whole and carries this user's mark.
"""

from __future__ import annotations

import datetime
import hmac
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fastadv.declared import parse_number
from fastadv.engine.model.precision import shown, tf32
from fastadv.engine.process.determinism import reproducible
from fastadv.engine.process.device import choose_device
from fastadv.errors import UserError, warn
from fastadv.evaluation.accuracy import specs_of
from fastadv.evaluation.attacks import attack as attacked
from fastadv.evaluation.attacks.names import OPTIONS
from fastadv.evaluation.search.engine import margins
from fastadv.evaluation.verdicts import Verdicts
from fastadv.run.console import Console, Terminal
from fastadv.run.eval_pass import TESTED, EvalJob, settings_of
from fastadv.run.eval_records import EvalRecords
from fastadv.run.finished import load_run
from fastadv.run.run_folder import RunFolder
from fastadv.run.source import EvalBatches
from fastadv.storage import trust
from fastadv.storage.digests import digest
from fastadv.storage.printable import printable

_MARK = "mark"


def verdicts_of(
    path: str,
    attack: str,
    *,
    which: str = "best",
    eps: str | None = None,
    alpha: str | None = None,
    limit: int | None = None,
    seed: int = 0,
    console: Console | None = None,
) -> Verdicts:
    """The verdicts on the test images of the run in ``path`` under ``attack``.

    The options are those of ``evaluate_run``, and the accuracy is the one that it gives. Raises
    ``UserError`` as it does.
    """
    (spec,) = specs_of([attack], None).values()
    config, data, model = load_run(path, which)
    device = choose_device(config.device)
    images = data.test.limited(limit)
    radius = config.eps if eps is None else float(parse_number(eps, "eps"))
    step = config.eval_alpha if alpha is None and eps is None else alpha
    if "steps" not in OPTIONS[spec.kind]:
        step = None
    step = None if step is None else float(parse_number(step, "alpha"))
    folder = RunFolder.open(path)
    job = EvalJob(config, data, device, EvalRecords(folder), f"{which} weights", TESTED)
    settings = settings_of(model, images, job)
    facts = settings | {
        "attack": spec.name,
        "images": settings["image_set"],
        "norm": config.norm,
        "eps": radius,
        "alpha": step,
        "seed": seed,
        "precision": shown(None, model, device),
    }
    file = folder.path / "verdicts" / f"{_plain(spec.name)}-{digest(facts)[:12]}.npz"
    found = _stored(file, facts)
    if found is None:
        with reproducible(config.deterministic), tf32(config.tf32):
            found = _judged(model.to(device), images, facts, job, console)
        _store(file, found)
    return found


def _judged(
    model: nn.Module,
    images: EvalBatches,
    facts: dict[str, Any],
    job: EvalJob,
    console: Console | None,
) -> Verdicts:
    """The verdicts on ``images``, attacked now."""
    parts: list[dict[str, Tensor]] = []
    done = 0
    title = f"evaluating {job.which} on {len(images):,} {job.images_name} under {facts['attack']}"
    options = {name: facts[name] for name in ("eps", "norm", "alpha", "seed")}
    console = console or Console(Terminal(quiet=True))
    with console.evaluating(title, facts["attack"], 0, len(images)) as tick:
        for x, y in images:
            x, y = x.to(job.device), y.to(job.device)
            index = torch.arange(done, done + len(x), device=job.device)
            x_adv = attacked(model, x, y, facts["attack"], index=index, **options)
            with torch.no_grad():
                logits = model.eval()(x_adv)
            right = logits.argmax(1) == y
            parts.append({"label": y, "right": right, "margin": margins(logits, y)})
            done += len(x)
            tick(done)
    arrays = {name: torch.cat([part[name] for part in parts]).cpu() for name in parts[0]}
    arrays |= {"index": images.rows, "fooled_by": -arrays["right"].long()}
    date = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    return Verdicts.collected(arrays, [facts["attack"]], facts | {"date": date})


def _stored(file: Path, facts: dict[str, Any]) -> Verdicts | None:
    """The verdicts in ``file``; None unless this user wrote them and they are of ``facts``."""
    if not file.exists():
        return None
    try:
        found = Verdicts.read(file)
    except UserError:
        return None
    mark = found.facts.get(_MARK)
    own = trust.sign(_content(found).encode())
    if not own or not isinstance(mark, str) or not hmac.compare_digest(own, mark):
        return None
    same = all(found.facts.get(name) == value for name, value in facts.items())
    return found if same else None


def _store(file: Path, found: Verdicts) -> None:
    folder = file.parent
    try:
        folder.mkdir(exist_ok=True)
        if folder.is_symlink():
            raise UserError(f"{printable(folder)} is a link")
        marked = {**found.facts, _MARK: trust.sign(_content(found).encode())}
        replace(found, facts=marked).write(file)
    except (OSError, UserError) as error:
        why = error.strerror if isinstance(error, OSError) else error
        warn(f"The verdicts cannot be stored in {printable(folder)} ({why}).")


def _content(found: Verdicts) -> str:
    """A digest of everything in ``found`` but its mark."""
    facts = {name: value for name, value in found.facts.items() if name != _MARK}
    arrays = (found.index, found.label, found.right, found.margin, found.fooled_by)
    content = [torch.from_numpy(np.ascontiguousarray(each)) for each in arrays]
    return digest([facts, list(found.stages), content])


def _plain(name: str) -> str:
    """``name`` as a part of a file name."""
    return re.sub(r"[^A-Za-z0-9.]+", "-", name)
