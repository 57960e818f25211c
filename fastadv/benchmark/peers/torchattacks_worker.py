"""torchattacks' PGD inside a training loop, as its documentation shows it."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module

from torch import Tensor
from torch.nn import functional

from fastadv.benchmark.ours import make_optimizer
from fastadv.benchmark.peers.serving import serve
from fastadv.benchmark.setting import ALPHA, EPS, STEPS, Setting, in_turn


def build(setting: Setting, attack_bn: str) -> Callable[[], Tensor]:
    """PGD-10 AT; the library attacks in eval mode by default."""
    model = setting.make_model()
    optimizer = make_optimizer(model)
    attack = import_module("torchattacks").PGD(
        model, eps=EPS, alpha=ALPHA, steps=STEPS, random_start=True
    )
    if attack_bn == "train":
        attack.set_model_training_mode(
            model_training=True, batchnorm_training=True, dropout_training=True
        )
    batches = in_turn(setting.batches())

    def training() -> Tensor:
        batch = next(batches)
        model.train()
        x_adv = attack(batch.x, batch.y)
        loss = functional.cross_entropy(model(x_adv), batch.y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return loss.detach()

    return training


if __name__ == "__main__":
    serve(build, "torchattacks")
