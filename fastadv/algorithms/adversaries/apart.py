"""APART: every residual block is attacked with its own step (APART, Alg. 1)."""

from typing import Any, Literal

import torch
from torch import Tensor

from fastadv import kernels
from fastadv.algorithms.adversaries.fgsm_plus import FGSMPlus
from fastadv.algorithms.contract import Batch, Context, Setup
from fastadv.declared import NonNegative, option
from fastadv.engine.gradient import gradients, leaf


class APART(FGSMPlus):
    """FGSM+ with noise inside the blocks: h_b <- h_b + alpha_b * sign(dL1/dh_b) in the outer pass.

    h_b is the input of the first convolution of block b, ReLU(BN(x_b)) in a pre-activation network.
    The shortcut stays clean, as in the released code. ``block_noise_at="input"`` adds the noise to
    the input x_b of the branch instead, as Alg. 1 line 4 prints. All alpha_b start at
    ``block_step_init``. ``layerwise=False`` is FGSM+.
    """

    block_step_init: NonNegative = option(0.0, "initial step size of the noise inside the blocks")
    block_noise_at: Literal["conv1", "input"] = option(
        "conv1", "where the noise enters: the block's first convolution or the branch's input"
    )
    layerwise: bool = option(True, "also perturb inside the blocks; without it APART is FGSM+")

    def requires(self) -> frozenset[str]:
        return super().requires() | ({"block_gradients"} if self.layerwise else set())

    @property
    def block_count(self) -> int:
        if not self.layerwise or self.setup.net.block_hooks is None:
            return 0
        return self.setup.net.block_hooks.count

    def prepare(self, setup: Setup) -> None:
        super().prepare(setup)
        self.steps.values[2:] = self.block_step_init

    def _signs(self, x0: Tensor, batch: Batch, context: Context) -> list[Tensor]:
        if not self.layerwise:
            return super()._signs(x0, batch, context)
        x0 = leaf(x0)
        logits, entering = self.net.logits_and_block_inputs(x0)
        loss = self.setup.attack_loss(logits, batch.attacked_y, context)
        return kernels.block_signs(gradients(loss, [x0, *entering]))

    def _block_noise(self, steps: Tensor, found: Context) -> list[Tensor] | None:
        if not self.layerwise:
            return None
        own = self.net.for_own_rows(steps[2:])
        return list(_BlockNoise.apply(own, *found.signs[1:]))


class _BlockNoise(torch.autograd.Function):
    """alpha_b s_b for all blocks at once; the gradient of alpha_b is sum(g_b s_b).

    The forward and the backward pass each take a constant number of launches. The sums are in
    float32 or wider, whatever the type of the blocks.
    """

    @staticmethod
    def forward(ctx: Any, alphas: Tensor, *signs: Tensor) -> tuple[Tensor, ...]:
        ctx.save_for_backward(*signs)
        return tuple(kernels.block_noise(signs, alphas))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        found = kernels.block_step_gradients(gradients, ctx.saved_tensors)
        return (found, *(None for _ in gradients))
