"""BatchNorm with a double backward pass that is cheap.

PyTorch composes BatchNorm's second derivative of two dozen operations on whole activations, in
float32 also for activations of half precision: a third of the time of an IGR step on a CPU. The
closed form needs four sums per channel, of which three are by-products of BatchNorm's backward
kernel, and one linear combination of three tensors.

With xhat = (x - mean) r, r = 1/sqrt(var + eps), M values per channel and <.> their mean, the
gradient for gy is gx = w r (gy - <gy> - xhat <gy xhat>). For a cotangent v of gx:

- of gy:  w r (v - <v> - xhat <v xhat>), the same operator;
- of w:   M r (<v gy> - <v><gy> - <v xhat><gy xhat>);
- of x:   -w r^2 (<v xhat> gy + <gy xhat> v - <gy><v xhat> - <v><gy xhat>
                  + xhat (<v gy> - <v><gy> - 3 <v xhat><gy xhat>)).

With running statistics gx = w r gy: of gy w r v, of w M r <v gy>, of x nothing.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from fastadv.engine.model.replaced_norm import is_pytorchs, replaced

aten = torch.ops.aten


@contextmanager
def cheap_double_backward(device: torch.device) -> Iterator[None]:
    """Within this context ``torch.nn.functional.batch_norm`` is the one below; on a CPU only, where
    it was measured.

    The results are those of PyTorch's. If other code has replaced it already, nothing is done.
    """
    if device.type != "cpu" or not is_pytorchs():
        yield
        return
    with replaced(batch_norm):
        yield


def batch_norm(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    """``torch.nn.functional.batch_norm`` with the same arguments and result. Its gradient for
    ``input`` can be differentiated once more; other second derivatives raise
    ``NotImplementedError``."""
    if training:
        functional._verify_batch_size(input.size())  # type: ignore[attr-defined]
    if weight is None:
        wide = torch.promote_types(input.dtype, torch.float32)
        kind = wide if running_mean is None else running_mean.dtype
        weight = torch.ones(input.shape[1], device=input.device, dtype=kind)
    if bias is None:
        bias = torch.zeros_like(weight)
    found: Tensor = _Forward.apply(
        input, weight, bias, running_mean, running_var, training, momentum, eps
    )
    return found


class _Forward(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor,
        running_mean: Tensor | None,
        running_var: Tensor | None,
        training: bool,
        momentum: float,
        eps: float,
    ) -> Tensor:
        y, mean, rate = torch.native_batch_norm(
            x, weight, bias, running_mean, running_var, training, momentum, eps
        )
        if not training and running_mean is not None and running_var is not None:
            mean, rate = running_mean.clone(), (running_var + eps).rsqrt()
        ctx.save_for_backward(x, weight, mean, rate)
        ctx.training = training
        return y

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        x, weight, mean, rate = ctx.saved_tensors
        found = _Backward.apply(gradient, x, weight, mean, rate, ctx.training)
        return *found, None, None, None, None, None


class _Backward(torch.autograd.Function):
    """The gradient of ``_Forward`` for x, weight and bias. Its derivative for x includes the one
    through the statistics: ``mean`` and ``rate`` (r) are functions of x."""

    @staticmethod
    def forward(
        ctx: Any,
        gradient: Tensor,
        x: Tensor,
        weight: Tensor,
        mean: Tensor,
        rate: Tensor,
        training: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:
        found = _kernel(gradient, x, weight, mean, rate, training)
        ctx.save_for_backward(gradient, x, weight, mean, rate, *found[1:])
        ctx.training = training
        ctx.set_materialize_grads(False)
        return found

    @staticmethod
    def backward(ctx: Any, v: Tensor | None, of_weight: Any, of_bias: Any) -> Any:
        gradient, x, weight, mean, rate, with_xhat, alone = ctx.saved_tensors
        if torch.is_grad_enabled() or of_weight is not None or of_bias is not None:
            raise NotImplementedError(
                "only BatchNorm's gradient for its input is differentiated, and only once more"
            )
        if v is None:
            return None, None, None, None, None, None
        for_gradient, v_xhat, v_alone = _kernel(v, x, weight, mean, rate, ctx.training)
        v_gradient = _sums_of_products(v, gradient, mean)
        if not ctx.training:
            return for_gradient, None, rate * v_gradient, None, None, None
        count = x.numel() // x.shape[1]
        parallel = v_xhat * with_xhat / count
        rest = v_gradient - v_alone * alone / count - parallel
        scale = -weight * rate * rate / count
        of_x = scale * rate * (rest - 2 * parallel)
        constant = -scale * (alone * v_xhat + v_alone * with_xhat) / count - of_x * mean
        for_x = _combined(constant, [(scale * v_xhat, gradient), (scale * with_xhat, v), (of_x, x)])
        return for_gradient, for_x, rate * rest, None, None, None


def _kernel(
    gradient: Tensor, x: Tensor, weight: Tensor, mean: Tensor, rate: Tensor, training: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """The operator gx applied to ``gradient``, the sums of ``gradient`` times xhat, and those of
    ``gradient``, both (C,)."""
    none = mean.new_empty(0)
    given = (none, none, mean, rate) if training else (mean, rate.pow(-2), none, none)
    found: tuple[Tensor, Tensor, Tensor] = aten.native_batch_norm_backward(
        gradient, x, weight, *given, training, 0.0, [True, True, True]
    )
    return found


def _sums_of_products(first: Tensor, second: Tensor, like: Tensor) -> Tensor:
    """The sum of ``first`` times ``second`` per channel, (C,) of the type of ``like``. It is the
    kernel's sum of a gradient times xhat with mean 0 and rate 1."""
    zero, one = torch.zeros_like(like), torch.ones_like(like)
    found: Tensor = aten.native_batch_norm_backward(
        first, second, one, None, None, zero, one, True, 0.0, [False, True, False]
    )[1]
    return found


def _combined(constant: Tensor, terms: list[tuple[Tensor, Tensor]]) -> Tensor:
    """The sum of ``constant`` (C,) and factors (C,) times tensors (B,C,...), in the tensors' type.

    Tensors are converted first, since operations on mixed types are many times slower on a CPU.
    """
    kind = terms[0][1].dtype
    over = (-1, *[1] * (terms[0][1].dim() - 2))
    total = constant.view(over)
    for factor, tensor in terms:
        total = torch.addcmul(total, factor.view(over), tensor.to(constant.dtype))
    return total.to(kind)
