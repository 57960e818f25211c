"""Read a finished run, and evaluate its weights."""

from __future__ import annotations

from torch import nn

from fastadv.declared import parse_number
from fastadv.engine.model.precision import tf32
from fastadv.engine.process.determinism import reproducible
from fastadv.engine.process.device import choose_device
from fastadv.errors import NotFiniteError, UserError, warn
from fastadv.run.config import RunConfig
from fastadv.run.console import Console
from fastadv.run.eval_pass import EvalJob, EvalScores, run_evaluation
from fastadv.run.eval_records import EvalRecords
from fastadv.run.eval_watch import Deadline
from fastadv.run.loaded import load_run
from fastadv.run.run_folder import RunFolder
from fastadv.run.source import Source
from fastadv.storage.printable import printable


def evaluate_run(
    path: str,
    attacks: str,
    *,
    which: str = "best",
    eps: str | None = None,
    alpha: str | None = None,
    on: str = "test",
    limit: int | None = None,
    seed: int = 0,
    deadline: Deadline | None = None,
    save_examples: bool = False,
    search_dtype: str = "float32",
    mode: str = "auto",
    data: str | None = None,
    data_root: str | None = None,
    console: Console | None = None,
) -> EvalScores:
    """Accuracy in [0,1] by attack; ``eps`` is the run's unless given, and so is the step ``alpha``
    of attacks with several steps (with another ``eps``: that of the attack). All test images are
    evaluated, or ``limit`` of them, each class in proportion; the run's own ``--test-limit`` is
    ignored. ``on`` "val": the run's validation images; "train": those it was trained on, without
    augmentation and with the labels that it was trained on.

    Each attack's result is a line in the folder's evaluations.jsonl, with the verdicts on all
    images in a file of verdicts/, and is not computed again. ``save_examples`` also writes the
    adversarial examples there: a .npy file (N,C,H,W) beside the verdicts. Interrupted, it raises
    ``EvaluationStopped`` with the finished attacks; the next call continues from there. At the
    ``deadline`` it returns what is known by then: ``bounds`` in place of the accuracies that are
    not, and the next call continues too.
    ``data`` and ``data_root`` say where the run's data are now; images of other data with the same
    classes are evaluated as well, and their results are kept apart. ``console`` shows the progress.
    """
    run = load_run(path, which, data=data, data_root=data_root, device=None)
    try:
        return evaluate_loaded(
            run.evaluated, run.folder, f"{run.which} weights", attacks,
            eps=eps, alpha=alpha, on=on, limit=limit, seed=seed, console=console,
            deadline=deadline, save_examples=save_examples, search_dtype=search_dtype,
            mode=mode,
        )  # fmt: skip
    except NotFiniteError as error:
        raise NotFiniteError(
            f"{printable(path)}, {run.which} weights: {error} Other weights of the run may be "
            "whole: --which best, last or a kept epoch."
        ) from None


def evaluate_loaded(
    loaded: tuple[RunConfig, Source, nn.Module],
    folder: RunFolder,
    which: str,
    attacks: str,
    *,
    eps: str | None = None,
    alpha: str | None = None,
    on: str = "test",
    limit: int | None = None,
    seed: int = 0,
    deadline: Deadline | None = None,
    save_examples: bool = False,
    search_dtype: str = "float32",
    mode: str = "auto",
    console: Console | None = None,
) -> EvalScores:
    """``evaluate_run`` of what was ``loaded``, whose weights are called ``which``; the results are
    kept in ``folder``."""
    config, data, model = loaded
    device = choose_device(config.device)
    if limit is not None and limit < 1:
        raise UserError(f"--limit must be at least 1, not {limit}.")
    images = data.evaluated_on(on).limited(limit)
    radius = config.eps if eps is None else parse_number(eps, "eps")
    if radius == 0:
        warn("eps 0: an attack moves no image, so every accuracy is the clean one.")
    step: float | str | None = alpha
    if alpha is None and eps is None:
        step = config.eval_alpha
    job = EvalJob(config, data, device, EvalRecords(folder), which, lasting=True)
    job.console = console or job.console
    job.saves_examples, job.deadline = save_examples, deadline or job.deadline
    job.search_dtype, job.mode = search_dtype, mode
    with reproducible(config.deterministic), tf32(config.tf32):
        return run_evaluation(
            model.to(device),
            images,
            attacks.split(","),
            job,
            eps=radius,
            alpha=step,
            seed=seed,
        )
