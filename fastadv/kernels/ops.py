"""Registration with ``torch.library``: schema, fake and autograd of the kernels that a compiler
must not take apart, torch only.

A compiler sees one operator a kernel. What it fuses with its surroundings (APART's taps, the small
losses) has none, and is the reference there. A scalar that may be a tensor is two arguments, since
a schema has no such type: the value, and the tensor or None. Eager calls do not come here.
"""

from typing import Any

import torch
from torch import Tensor

from .ops_fake import FAKES
from .ops_run import IMPLEMENTATIONS

NAMESPACE = "fastadv"
KEY = "int seed, Tensor? seed_tensor, int offset, Tensor? offset_tensor"
VIEW = "Tensor index, Tensor top, Tensor left, Tensor flip"
STEP = "Tensor x_adv, Tensor grad, Tensor x, float alpha, Tensor? alpha_tensor, float eps"
BOX = "float low, float high"
NOISE = f"(Tensor index, SymInt[] shape, {KEY}, int stream, ScalarType dtype) -> Tensor"
START = f"(Tensor x, float eps, Tensor index, {KEY}, {BOX}, int stream) -> Tensor"
PROJECT = f"(Tensor x_adv, Tensor x, float eps, {BOX}) -> Tensor"

SCHEMAS = {
    "noise_uniform": NOISE,
    "noise_normal": NOISE,
    "linf_start": START,
    "l2_start": START,
    "linf_step": f"({STEP}, {BOX}) -> Tensor",
    "linf_step_out": f"({STEP}, {BOX}, Tensor(a!) out) -> ()",
    "l2_step": f"({STEP}, {BOX}) -> Tensor",
    "linf_project": PROJECT,
    "l2_project": PROJECT,
    "perturb_weights": "(Tensor(a!)[] weights, Tensor(b!)[] directions, float gamma,"
    " Tensor? gamma_tensor, str scope) -> ()",
    "restore_weights": "(Tensor(a!)[] weights, Tensor[] originals, Tensor[] v) -> ()",
    "top_n_sum": "(Tensor z, Tensor z_adv, SymInt n) -> (Tensor, Tensor)",
    "crop_flip": f"(Tensor store, {VIEW}, SymInt h, SymInt w, ScalarType dtype, float fill,"
    " str padding, bool channels_last) -> Tensor",
    "crop_flip_add": f"(Tensor store, {VIEW}, Tensor x, float scale, Tensor? scale_tensor,"
    f" float eps, {BOX}) -> (Tensor, Tensor)",
    "crop_flip_write": f"(Tensor(a!) store, {VIEW}, Tensor window, Tensor? ok) -> ()",
    "crop_flip_ascend": f"(Tensor(a!) store, {VIEW}, Tensor grad, float rate,"
    f" Tensor? rate_tensor, {BOX}, Tensor? ok) -> ()",
}

_LIBRARY = torch.library.Library(NAMESPACE, "FRAGMENT")
for _name, _schema in SCHEMAS.items():
    _LIBRARY.define(_name + _schema)
    for _key in ("CPU", "CUDA"):
        _LIBRARY.impl(_name, IMPLEMENTATIONS[_name], _key)
    torch.library.register_fake(f"{NAMESPACE}::{_name}", FAKES[_name], lib=_LIBRARY)

OPERATORS = torch.ops.fastadv


def _save_kept(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(output[1])
    ctx.dtypes = (inputs[0].dtype, inputs[1].dtype)


def _top_n_gradients(ctx: Any, grad: Tensor, _kept: Tensor) -> tuple[Tensor, Tensor, None]:
    direction = ctx.saved_tensors[0] * grad
    return direction.to(ctx.dtypes[0]), (-direction).to(ctx.dtypes[1]), None


torch.library.register_autograd(
    f"{NAMESPACE}::top_n_sum", _top_n_gradients, setup_context=_save_kept, lib=_LIBRARY
)
