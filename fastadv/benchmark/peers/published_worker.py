"""The published loop without TF32, in a process of its own.

The rounding of float32 products is a process-wide setting and part of the compiler's cache key: in
our process it would make our candidates compile again.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from fastadv.benchmark.ours import make_optimizer
from fastadv.benchmark.peers.published import PublishedLoop
from fastadv.benchmark.peers.serving import serve
from fastadv.benchmark.setting import Setting, in_turn
from fastadv.errors import UserError


def build(setting: Setting, attack_bn: str) -> Callable[[], None]:
    """PGD-10 AT as published, without TF32; BatchNorm stays in train mode in its attack."""
    if attack_bn != "train":
        raise UserError("The published loop attacks in train mode only.")
    torch.backends.cudnn.benchmark = True  # as in the process that runs ours
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False
    model = setting.make_model()
    loop = PublishedLoop(model, make_optimizer(model))
    batches = in_turn(setting.batches())

    def training() -> None:
        batch = next(batches)
        loop(batch.x, batch.y)

    return training


if __name__ == "__main__":
    serve(build, "torch")
