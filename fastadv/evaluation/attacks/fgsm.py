"""FGSM: the textbook definition, and the variant used in the tables of RWP."""

from torch import Tensor

from fastadv.evaluation.attacks.names import AttackSpec
from fastadv.evaluation.attacks.pgd_loop import ce, first_point, pgd_loop
from fastadv.evaluation.attacks.problem import Problem


def textbook(problem: Problem, spec: AttackSpec) -> Tensor:
    """x' = box(x + eps sign grad CE(f(x), y)) (Goodfellow et al., 2015; AdvLC's tables).

    In L2 the step follows the normalised gradient. ``alpha`` replaces the step of eps.
    """
    return _one_step(problem, spec, random=False, reach=1.0)


def of_rwp(problem: Problem, spec: AttackSpec) -> Tensor:
    """One step of 2 eps from a random point, projected: "FGSM" in the tables of RWP (Yu et al.;
    eval_pgd.py: 16/255 at eps 8/255, from a start that is clipped to the range of images).

    Every coordinate with a gradient ends on the ball's surface, as in FGSM; the difference is the
    point at which the gradient is computed.
    """
    return _one_step(problem, spec, random=True, reach=2.0)


def _one_step(problem: Problem, spec: AttackSpec, *, random: bool, reach: float) -> Tensor:
    alpha = problem.threat.of_eps(reach) if spec.alpha is None else spec.alpha
    random = random if spec.random_start is None else spec.random_start
    return pgd_loop(problem, first_point(problem, random), ce, alpha=alpha, steps=1)
