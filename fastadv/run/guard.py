"""Notices catastrophic overfitting of single-step training while it happens, within an epoch.

A fixed subset of the training images is attacked with PGD-10 a few times per epoch. Wong et al.
(2020, Sec. 5.4) stop when its accuracy has fallen by 20 points on a minibatch; Andriushchenko and
Flammarion (2020, Sec. 3) show that the accuracy under the training attack does not fall with it.
So the rule is: the PGD-10 accuracy of the subset is at least 20 points below the best one so
far and at most half of it, while the accuracy on the attacked training batches is not more than
5 points below what it was then. A network that merely unlearns, at a high rate, loses both.

Measured on digits (``bench/overfitting.py``, ``bench/results/guard.jsonl``): twelve runs, FGSM,
N-FGSM and FAST at eps 0.3 and FGSM at 0.2, three seeds each. The two whose robust accuracy
collapsed fell by 28 and 36 points, to 14 and 4 % of their best, while the training accuracy rose,
and each was noticed in the epoch of its fall. The largest fall of the ten others was 12.5 points.

``back`` trains on from the last check without this sign, with half the attack's step: the smaller
the step, the later the linearity of the loss that a single step relies on is lost (Andriushchenko
and Flammarion, Sec. 3; Wong et al., Fig. 3 for the step).
"""

from __future__ import annotations

import math
import warnings
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from fastadv.algorithms.contract import INPUT_GRADIENT, UNITS
from fastadv.algorithms.cost import units
from fastadv.algorithms.plan import Plan
from fastadv.by_epoch import ByEpoch
from fastadv.errors import NotFiniteError, UserError
from fastadv.evaluation.accuracy import evaluate
from fastadv.run.config import RunConfig
from fastadv.run.epoch_metrics import percent
from fastadv.run.session import Session

ATTACK, STEPS = "pgd-10", 10
FALL, SHARE, KEPT = 0.2, 0.5, 0.05
"""Points that the robust accuracy has lost, the share of its best that is left at most, and points
that the attacked training accuracy may have lost."""
MOST_CHECKS, FEWEST_IMAGES, MOST_IMAGES = 4, 64, 128
BUDGET = 0.03  # of an epoch's passes; small sets take one check of the fewest images all the same
MOST_BACKS = 3


@dataclass
class Seen:
    """What the guard has seen; it is a part of every checkpoint.

    ``best`` is the highest PGD-10 accuracy of the subset, ``trained`` the accuracy on the attacked
    training batches before that check. ``right`` and ``images`` count since the last check.
    ``backs`` is how often the run went back.
    """

    best: float = 0.0
    trained: float = 0.0
    now: float = -1.0
    right: float = 0.0
    images: int = 0
    backs: int = 0
    collapsed: bool = False
    noticed: bool = False  # in this epoch


class Guard:
    """Looks at a run's network ``checks`` times per epoch, on ``count`` images.

    Raises ``UserError`` if ``back`` is asked for an attack whose step is not one number.
    """

    def __init__(self, session: Session) -> None:
        self.session, self.does = session, session.config.guard_overfitting
        if self.does == "back":
            _require_one_step(session.config)
        self.checks, self.count, self.share = _size(session.step.plan, session.data.trained_on)
        batches = len(session.data.loader)
        self._due = {math.ceil(batches * k / self.checks) for k in range(1, self.checks + 1)}
        self._right = torch.zeros((), dtype=torch.float64, device=session.device)
        self._images: list[tuple[Tensor, Tensor]] | None = None
        self.seen = Seen()

    @property
    def may_go_back(self) -> bool:
        """True if the run goes back when it overfits: asked for, and not done too often."""
        return self.does == "back" and self.seen.backs < MOST_BACKS

    def sentence(self) -> str:
        """What the guard does, and what it costs."""
        return (
            f"guard against overfitting: {ATTACK} on {self.count} training images, "
            f"{'once' if self.checks == 1 else f'{self.checks} times'} per epoch; that adds "
            f"{100 * self.share:.1f} % to the passes of an epoch"
        )

    def step_sizes(self, x: Tensor) -> Tensor | None:
        """The attack's step (B,) in pixels for the images ``x`` (B,C,H,W) after going back; None:
        the method's own."""
        if not self.seen.backs:
            return None
        adversary = self.session.step.plan.adversary
        own, usual = adversary.chosen_step, adversary.usual_step(self.session.step.threat)
        assert not isinstance(own, ByEpoch)  # ``_require_one_step``
        size = float(usual if own is None else own) * 0.5**self.seen.backs
        return torch.full((len(x),), size, dtype=x.dtype, device=x.device)

    def add(self, metrics: dict[str, Tensor], images: int) -> None:
        """Note the ``metrics`` of a step on ``images`` images; nothing waits for the device."""
        if "accuracy" in metrics:
            self._right += metrics["accuracy"] * images
            self.seen.images += images

    def is_due(self, batch: int) -> bool:
        """True after batch number ``batch`` of an epoch (from 1) if the network is to be looked
        at."""
        return batch in self._due

    def look(self) -> bool:
        """Attack the subset; true if the network has just overfitted. All processes must call it;
        waits for the device."""
        seen = self.seen
        trained = self._trained()
        found = self._accuracy()
        if found is None or trained is None:
            return False
        seen.now = found
        if found >= seen.best:
            seen.best, seen.trained, seen.collapsed = found, trained, False
            return False
        lost = found <= seen.best - FALL and found <= SHARE * seen.best
        fell = lost and trained >= seen.trained - KEPT
        first = fell and not seen.collapsed
        seen.collapsed = fell or (seen.collapsed and found <= seen.best - FALL / 2)
        seen.noticed |= first
        return first

    def _trained(self) -> float | None:
        seen = self.seen
        right, images = seen.right + float(self._right), seen.images
        self._right.zero_()
        seen.right, seen.images = 0.0, 0
        return right / images if images else None

    def _accuracy(self) -> float | None:
        """The subset's accuracy under the attack; None for a network that is not finite, which the
        step itself reports."""
        session = self.session
        if self._images is None:
            self._images = list(session.data.training.limited(self.count))
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                scores = evaluate(
                    session.model,
                    self._images,
                    (ATTACK,),
                    threat=session.threat,
                    seed=session.config.seed,
                    shared=True,
                    mode="eager",
                )
        except NotFiniteError:
            return None
        return scores[ATTACK]

    def alarm(self) -> str:
        """What was noticed, as a sentence."""
        seen = self.seen
        return (
            f"catastrophic overfitting after step {self.session.step.calls}: {ATTACK} accuracy of "
            f"{self.count} training images fell from {100 * seen.best:.0f} % to "
            f"{100 * seen.now:.0f} %, and the accuracy under the training attack did not"
        )

    def line(self) -> dict[str, Any]:
        """The guard's numbers of an epoch, for metrics.jsonl."""
        found: dict[str, Any] = {}
        if self.seen.now >= 0:
            found[f"guard_{ATTACK}_percent"] = percent(self.seen.now)
        if self.seen.noticed:
            found["overfitting"] = True
        self.seen.noticed = False
        return found

    def went_back(self, saved: Any) -> None:
        """Take over the ``state`` of an earlier check, and halve the attack's step once more."""
        backs = self.seen.backs + 1
        self.load_state(saved)
        self.seen.backs = backs

    def state(self) -> dict[str, Any]:
        """What a checkpoint holds of the guard; waits for the device."""
        return asdict(self.seen) | {"right": self.seen.right + float(self._right)}

    def load_state(self, saved: Any) -> None:
        """Continue from ``state``. Raises ``UserError`` for anything else."""
        if saved is None:  # the guard was added later
            return
        try:
            seen = Seen(**saved)
            kinds = all(type(value) is type(getattr(Seen(), k)) for k, value in vars(seen).items())
            if not kinds or not 0 <= seen.backs <= MOST_BACKS:
                raise ValueError("values of another kind")
        except (TypeError, ValueError) as error:
            raise UserError(
                f"The checkpoint's guard does not belong to this run ({error}): restore last.pt."
            ) from None
        self.seen = seen
        self._right.zero_()


def _require_one_step(config: RunConfig) -> None:
    """Raise ``UserError`` unless the attack's step is one number, which can be halved."""
    adversary = config.plan.adversary
    alpha = adversary.chosen_step
    if not adversary.takes_alpha:
        why = f"the attack of {config.method} takes none of a chosen size"
    elif isinstance(alpha, ByEpoch):
        why = f"--alpha {alpha} changes with the epoch"
    elif alpha is None and config.eps_warmup is not None:
        why = "without --alpha it follows the eps of --eps-warmup"
    elif alpha is None and adversary.draws_radii:
        why = f"{config.method} has another one for each image unless --alpha says it"
    else:
        return
    raise UserError(
        f"--guard-overfitting back halves the attack's step, and {why}: take stop or tell."
    )


def _size(plan: Plan, images: int) -> tuple[int, int, float]:
    """Checks per epoch, images of a check, and their share of the passes of an epoch of
    ``images`` images."""
    attack = STEPS * UNITS[INPUT_GRADIENT] + 1
    epoch = units(plan) * plan.updates_per_batch * images
    budget = BUDGET * epoch / attack
    checks = min(max(int(budget / FEWEST_IMAGES), 1), MOST_CHECKS)
    count = min(max(int(budget / checks), FEWEST_IMAGES), MOST_IMAGES, images)
    return checks, count, checks * count * attack / epoch
