"""Gaussian noise instead of an attack (in APART's tables; sigma is not stated there)."""

from torch import Tensor

from fastadv import kernels
from fastadv.evaluation.attacks.names import AttackSpec
from fastadv.evaluation.attacks.problem import STREAM, Problem


def add_noise(problem: Problem, spec: AttackSpec) -> Tensor:
    """box(x + sigma n), n ~ N(0, I), one draw per sample; not bounded by eps."""
    if spec.sigma is None:
        raise RuntimeError("noise without a standard deviation passed parse_attack")
    x, threat = problem.x, problem.threat
    drawn = kernels.noise_normal(
        problem.index, tuple(x.shape[1:]), problem.seed, 0, STREAM, x.dtype
    )
    return threat.clip(x + threat.movable(spec.sigma * drawn))
