"""The public functions: each is its reference, or another face of it where that can run."""

import functools
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import torch

from . import ops_traced, reference
from .choice import device_of, triton_function, why_not_triton

P = ParamSpec("P")
R = TypeVar("R")


def faced(plain: Callable[P, R]) -> Callable[P, R]:
    """The public function: the reference's signature, the face that the arguments allow.

    On a CPU, a compiler sees the reference itself and can fuse it; where Triton would run it sees
    one registered operator, or the reference of what has none: what is added to a tensor or summed
    from one costs no pass over memory where it is fused with what made that tensor.
    """

    name = plain.__name__

    @functools.wraps(plain)
    def public(*args: P.args, **kwargs: P.kwargs) -> R:
        values = (*args, *kwargs.values())
        device = device_of(values)
        if device.type != "cuda" or why_not_triton(device, values) is not None:
            return plain(*args, **kwargs)
        if torch.compiler.is_compiling():
            traced: Callable[P, R] = ops_traced.FUNCTIONS.get(name, plain)
            return traced(*args, **kwargs)
        return triton_function(name)(*args, **kwargs)

    return public


block_noise = faced(reference.block_noise)
block_signs = faced(reference.block_signs)
block_step_gradients = faced(reference.block_step_gradients)
crop_flip = faced(reference.crop_flip)
crop_flip_add = faced(reference.crop_flip_add)
crop_flip_ascend = faced(reference.crop_flip_ascend)
crop_flip_write = faced(reference.crop_flip_write)
l2_project = faced(reference.l2_project)
l2_start = faced(reference.l2_start)
l2_step = faced(reference.l2_step)
linf_project = faced(reference.linf_project)
linf_start = faced(reference.linf_start)
linf_step = faced(reference.linf_step)
masked_ce = faced(reference.masked_ce)
noise_normal = faced(reference.noise_normal)
noise_uniform = faced(reference.noise_uniform)
perturb_weights = faced(reference.perturb_weights)
restore_weights = faced(reference.restore_weights)
top_n_sum = faced(reference.top_n_sum)
trades_kl = faced(reference.trades_kl)
