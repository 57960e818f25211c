"""ART's ``AdversarialTrainerMadryPGD``, one batch per step."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module

import torch

from fastadv.benchmark.ours import make_optimizer
from fastadv.benchmark.peers.serving import serve
from fastadv.benchmark.setting import ALPHA, EPS, STEPS, Setting
from fastadv.errors import UserError


def build(setting: Setting, attack_bn: str) -> Callable[[], None]:
    """PGD-10 AT by ART's own trainer; its attack is always in eval mode.

    ART attacks in batches of 32 by default; here the attack gets the whole batch.
    """
    if attack_bn != "eval":
        raise UserError("ART attacks in eval mode only")
    model = setting.make_model()
    classifier = import_module("art.estimators.classification").PyTorchClassifier(
        model=model,
        loss=torch.nn.CrossEntropyLoss(),
        optimizer=make_optimizer(model),
        input_shape=setting.image_shape,
        nb_classes=setting.num_classes,
        clip_values=(0.0, 1.0),
        device_type="gpu" if setting.device.startswith("cuda") else "cpu",
    )
    size = setting.batch_size
    trainer = import_module("art.defences.trainer").AdversarialTrainerMadryPGD(
        classifier, nb_epochs=1, batch_size=size, eps=EPS, eps_step=ALPHA, max_iter=STEPS
    )
    trainer.attack.set_params(batch_size=size)
    arrays = [(batch.x.cpu().numpy(), batch.y.cpu().numpy()) for batch in setting.batches()]
    position = 0

    def training() -> None:
        nonlocal position
        images, labels = arrays[position % len(arrays)]
        position += 1
        trainer.fit(images, labels)

    return training


if __name__ == "__main__":
    serve(build, "adversarial-robustness-toolbox")
