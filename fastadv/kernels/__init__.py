"""The arithmetic of adversarial training that is not convolution: one entry per operator.

An entry names the PyTorch reference, which runs on any device and gives the public function its
signature, and the module of the Triton launcher with the same name. With a schema (see
``registration.py``) a compiler that traces for a GPU sees one registered operator; without one it
sees the reference, because fusing it with its surroundings saves passes over memory.
``backends(device)`` says which of them runs.
"""

from . import philox, reference, reference_crop, reference_guard, reference_pad, reference_top_n
from .dispatch import backends, define
from .norm import fused_norm, norm_apply, norm_gradients, norm_statistics
from .norm_operator import FUSED_NORM, FUSED_NORM_SHARED
from .registration import Autograd

__all__ = [
    "FUSED_NORM",
    "FUSED_NORM_SHARED",
    "backends",
    "fused_norm",
    "norm_apply",
    "norm_gradients",
    "norm_statistics",
]

BOX = "float low, float high"
KEY = "int|Tensor seed, int|Tensor offset"
VIEW = "Tensor index, Tensor top, Tensor left, Tensor flip"
NOISE = f"(Tensor index, SymInt[] shape, {KEY}, int stream, ScalarType dtype) -> Tensor"
START = f"(Tensor x, float|Tensor eps, Tensor index, {KEY}, {BOX}, int stream) -> Tensor"
STEP = (
    f"(Tensor x_adv, Tensor grad, Tensor x, float|Tensor alpha, float|Tensor eps, {BOX}) -> Tensor"
)
PROJECT = f"(Tensor x_adv, Tensor x, float|Tensor eps, {BOX}) -> Tensor"

noise_uniform = define(philox.noise_uniform, "triton_noise", NOISE, fake=philox.empty_noise)
noise_normal = define(philox.noise_normal, "triton_noise", NOISE, fake=philox.empty_noise)

linf_start = define(reference.linf_start, "triton_noise", START, like="x")
linf_step = define(reference.linf_step, "triton_linf", STEP, like="x_adv")
linf_project = define(reference.linf_project, "triton_linf", PROJECT, like="x_adv")

l2_start = define(reference.l2_start, "triton_l2", START, like="x")
l2_step = define(reference.l2_step, "triton_l2", STEP, like="x_adv")
l2_project = define(reference.l2_project, "triton_l2", PROJECT, like="x_adv")

crop_flip = define(
    reference_crop.crop_flip,
    "triton_crop",
    f"(Tensor store, {VIEW}, SymInt h+w, ScalarType dtype, float fill, str padding,"
    " bool channels_last) -> Tensor",
    fake=reference_crop.empty_windows,
)
crop_flip_add = define(
    reference_crop.crop_flip_add,
    "triton_crop",
    f"(Tensor store, {VIEW}, Tensor x, float|Tensor scale, float|Tensor eps, {BOX})"
    " -> (Tensor, Tensor)",
    like="x",
)
crop_flip_write = define(
    reference_crop.crop_flip_write,
    "triton_crop",
    f"(Tensor(a!) store, {VIEW}, Tensor window, Tensor? ok) -> ()",
)
crop_flip_ascend = define(
    reference_crop.crop_flip_ascend,
    "triton_crop",
    f"(Tensor(a!) store, {VIEW}, Tensor grad, float|Tensor rate, {BOX}, Tensor? ok) -> ()",
)

perturb_weights = define(
    reference.perturb_weights,
    "triton_weights",
    "(Tensor(a!)[] weights, Tensor(b!)[] directions, float|Tensor gamma, str scope) -> ()",
)
restore_weights = define(
    reference.restore_weights,
    "triton_weights",
    "(Tensor(a!)[] weights, Tensor[] originals, Tensor[] v) -> ()",
)

top_n_sum = define(
    reference.top_n_sum,
    "triton_top_n",
    "(Tensor z, Tensor z_adv, SymInt n) -> (Tensor, Tensor)",
    fake=reference_top_n.empty_top_n,
    autograd=Autograd(
        reference_top_n.top_n_forward,
        reference_top_n.save_kept,
        reference_top_n.top_n_backward,
    ),
)

pad_channels = define(reference_pad.pad_channels, "triton_pad")

trades_kl = define(reference.trades_kl, "triton_losses")
masked_ce = define(reference.masked_ce, "triton_losses")
block_signs = define(reference.block_signs, "triton_block_noise")
block_noise = define(reference.block_noise, "triton_block_noise")
block_step_gradients = define(reference.block_step_gradients, "triton_block_noise")

not_finite = define(reference_guard.not_finite, "triton_guard")
put_back_unless = define(reference_guard.put_back_unless, "triton_guard")
record_fault = define(reference_guard.record_fault, "triton_guard")
look_at_batch = define(reference_guard.look_at_batch, "triton_batch")
unmoved_images = define(reference_guard.unmoved_images, "triton_batch")
