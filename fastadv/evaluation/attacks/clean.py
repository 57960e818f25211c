"""No attack: the images as they are."""

from torch import Tensor

from fastadv.evaluation.attacks.names import AttackSpec
from fastadv.evaluation.attacks.problem import Problem


def unchanged(problem: Problem, spec: AttackSpec) -> Tensor:
    """x' = x."""
    return problem.x.clone()
