"""Read a finished run, and evaluate its weights."""

from __future__ import annotations

from torch import nn

from fastadv.declared import parse_number
from fastadv.engine.model.precision import tf32
from fastadv.engine.process.determinism import reproducible
from fastadv.engine.process.device import choose_device
from fastadv.errors import UserError, warn
from fastadv.run import provenance
from fastadv.run.config import RunConfig
from fastadv.run.console import Console
from fastadv.run.eval_pass import EvalJob, EvalScores, run_evaluation
from fastadv.run.eval_records import EvalRecords
from fastadv.run.eval_watch import Deadline
from fastadv.run.run_folder import RunFolder
from fastadv.run.saved_models import check_fit
from fastadv.run.saved_run import begun_with
from fastadv.run.session import data_facts, make_model
from fastadv.run.source import Source, open_source
from fastadv.run.which import one_named, weights_file
from fastadv.storage import checkpoint
from fastadv.storage.printable import printable


def load_run(path: str, which: str) -> tuple[RunConfig, Source, nn.Module]:
    """Configuration, data and network of the run in ``path``, with the weights ``which``: "best",
    "last" or the number of an epoch whose weights were kept."""
    folder = RunFolder.open(path)
    which = one_named(which)
    config = folder.read_config()
    file = weights_file(folder, which)
    if file == folder.last and _averages(config) and folder.summary.exists():
        raise UserError(
            f"{printable(folder.averaged)} is missing, and last.pt holds other weights than those "
            "the run ended with: restore it, or evaluate the best weights."
        )
    saved = checkpoint.load(file)
    state = saved.get("model")
    begun = begun_with(folder, config)
    data = open_source(config, choose_device(config.device), begun=begun)
    check_fit(config, data_facts(data), state, file)
    provenance.require_own(saved, config, file)
    model = make_model(config, data)
    checkpoint.load_weights(model, state, file)
    if provenance.source(config.model) and folder.last.exists():
        before = checkpoint.load(folder.last)["provenance"]["machine"]["source of the network"]
        if before != provenance.source(config.model):
            warn(
                f"the code of {config.model} is not what {printable(path)} was trained with, so "
                "the results may belong to another network."
            )
    return config, data, model


def _averages(config: RunConfig) -> bool:
    return config.plan.averaging is not None


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
    ``console`` shows the progress.
    """
    which = one_named(which)
    config, data, model = load_run(path, which)
    folder = RunFolder.open(path)
    return evaluate_loaded(
        (config, data, model), folder, f"{which} weights", attacks,
        eps=eps, alpha=alpha, on=on, limit=limit, seed=seed, console=console,
        deadline=deadline, save_examples=save_examples, search_dtype=search_dtype,
        mode=mode,
    )  # fmt: skip


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
