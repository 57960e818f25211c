"""The test at the end of a run: of its best and its last weights, once."""

from __future__ import annotations

import time
from typing import Any

from fastadv.engine.process import distributed
from fastadv.run.ended import EPOCHS
from fastadv.run.eval_pass import EvalScores
from fastadv.run.own_scores import OwnScores
from fastadv.run.recovery import best_from_kept, lost_best
from fastadv.storage import checkpoint
from fastadv.storage.printable import printable


def final_test(scores: OwnScores) -> dict[str, Any]:
    """Test accuracy of the best and the last weights, for summary.json."""
    session, folder, progress = scores.session, scores.folder, scores.progress
    config = session.config
    began = time.monotonic()
    with session.step.evaluation_weights(scores.statistics_batches(config.epochs - 1)):
        last = scores.evaluate(session.data.test, config.test_attacks, "last weights")
        if session.step.plan.averaging is not None:
            folder.save(folder.averaged, scores.saving.weights(config.epochs))
    before = last.seconds_before
    live = {name: value.clone() for name, value in session.model.state_dict().items()}
    best: EvalScores | None = last
    if progress.best_epoch != config.epochs and not _has_best(scores):
        best = None
    elif progress.best_epoch != config.epochs:
        saved = checkpoint.load(folder.best)
        checkpoint.load_weights(session.model, saved["model"], folder.best)
        best = scores.evaluate(session.data.test, config.test_attacks, "best weights")
        session.model.load_state_dict(live)
        before += best.seconds_before
    progress.eval_seconds += time.monotonic() - began + before
    return {
        "n": last.n,
        "best": best,
        "last": last,
        "intervals": {
            which: found and {name: list(found.interval(name)) for name in found}
            for which, found in (("best", best), ("last", last))
        },
        EPOCHS: config.epochs,
        "best_epoch": progress.best_epoch,
        "train_seconds": round(progress.train_seconds, 2),
        "eval_seconds": round(progress.eval_seconds, 2),
    }


def _has_best(scores: OwnScores) -> bool:
    """True if best.pt has the weights of the best epoch; if it should, and has not, this is
    said."""
    session, folder = scores.session, scores.folder
    if not scores.saving.kept.best:
        return False
    best = scores.progress.best_epoch
    lost = lost_best(folder, session.config, best)
    if not distributed.any_process(lost is not None, session.device):
        return True
    made = distributed.rank() == 0 and best_from_kept(folder, best)
    if distributed.any_process(made, session.device):
        return True
    scores.console.warn(
        f"{lost} The results are those of the last weights alone; to have both, restore it, "
        f"delete {printable(folder.summary)} and --resume."
    )
    return False
