"""Registration with ``torch.library``: schema, fake and autograd of each kernel, torch only.

A compiler sees one operator a kernel. A scalar that may be a tensor is two arguments, since a
schema has no such type: the value, and the tensor or None. Eager calls do not come here.
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
    "linf_step_normalized": f"({STEP}, Tensor mean, Tensor std, {BOX}, ScalarType dtype)"
    " -> (Tensor, Tensor)",
    "l2_step": f"({STEP}, {BOX}) -> Tensor",
    "linf_project": PROJECT,
    "l2_project": PROJECT,
    "perturb_weights": "(Tensor(a!)[] weights, Tensor(b!)[] directions, float gamma,"
    " Tensor? gamma_tensor, str scope) -> ()",
    "restore_weights": "(Tensor(a!)[] weights, Tensor[] originals, Tensor[] v) -> ()",
    "top_n_sum": "(Tensor z, Tensor z_adv, SymInt n) -> (Tensor, Tensor)",
    "crop_flip": f"(Tensor store, {VIEW}, SymInt h, SymInt w, ScalarType dtype, float fill,"
    " str padding) -> Tensor",
    "crop_flip_add": f"(Tensor store, {VIEW}, Tensor x, float scale, Tensor? scale_tensor,"
    f" float eps, {BOX}) -> (Tensor, Tensor)",
    "crop_flip_write": f"(Tensor(a!) store, {VIEW}, Tensor window, Tensor? ok) -> ()",
    "crop_flip_ascend": f"(Tensor(a!) store, {VIEW}, Tensor grad, float rate,"
    f" Tensor? rate_tensor, {BOX}, Tensor? ok) -> ()",
    "trades_kl": "(Tensor logits_p, Tensor logits_q) -> Tensor",
    "trades_kl_backward": "(Tensor grad, Tensor logits_p, Tensor logits_q, bool want_p,"
    " bool want_q) -> (Tensor, Tensor)",
    "masked_ce": "(Tensor logits, Tensor y, float c_min, Tensor? c_min_tensor)"
    " -> (Tensor, Tensor, Tensor)",
    "masked_ce_backward": "(Tensor grad, Tensor logits, Tensor y, Tensor kept) -> Tensor",
    "block_signs": "(Tensor[] gradients) -> Tensor[]",
    "block_noise": "(Tensor[] signs, Tensor alphas) -> Tensor[]",
    "block_step_gradients": "(Tensor[] gradients, Tensor[] signs) -> Tensor",
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


def _save_logits(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _kl_gradients(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    wants = ctx.needs_input_grad
    found = OPERATORS.trades_kl_backward(grad, *ctx.saved_tensors, wants[0], wants[1])
    return tuple(g if want else None for g, want in zip(found, wants, strict=True))


def _save_mask(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(*inputs[:2], output[2])


def _ce_gradient(ctx: Any, grad: Tensor, *_rest: Tensor) -> tuple[Tensor, None, None, None]:
    return OPERATORS.masked_ce_backward(grad, *ctx.saved_tensors), None, None, None


for _name, _backward, _setup in (
    ("top_n_sum", _top_n_gradients, _save_kept),
    ("trades_kl", _kl_gradients, _save_logits),
    ("masked_ce", _ce_gradient, _save_mask),
):
    torch.library.register_autograd(
        f"{NAMESPACE}::{_name}", _backward, setup_context=_setup, lib=_LIBRARY
    )
