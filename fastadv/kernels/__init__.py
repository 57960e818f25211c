"""The hot arithmetic of adversarial training that is not convolution.

Each function has a plain PyTorch reference, which runs anywhere, and a Triton kernel for CUDA.
``torch.compile`` sees a registered operator as one node, or the reference where it gains by fusing
it. ``faces(device)`` says which runs.
"""

from .choice import faces
from .public import (
    block_noise,
    block_signs,
    block_step_gradients,
    crop_flip,
    crop_flip_add,
    crop_flip_ascend,
    crop_flip_write,
    l2_project,
    l2_start,
    l2_step,
    linf_project,
    linf_start,
    linf_step,
    masked_ce,
    noise_normal,
    noise_uniform,
    perturb_weights,
    restore_weights,
    top_n_sum,
    trades_kl,
)

__all__ = [
    "block_noise",
    "block_signs",
    "block_step_gradients",
    "crop_flip",
    "crop_flip_add",
    "crop_flip_ascend",
    "crop_flip_write",
    "faces",
    "l2_project",
    "l2_start",
    "l2_step",
    "linf_project",
    "linf_start",
    "linf_step",
    "masked_ce",
    "noise_normal",
    "noise_uniform",
    "perturb_weights",
    "restore_weights",
    "top_n_sum",
    "trades_kl",
]
