"""Adversarial training as a LightningModule: ATTA on scikit-learn's digits.

Twenty seconds on a CPU. Optimization is manual: `fastadv.step` computes the gradients and calls the
optimizer. Interrupt it and start it again: it resumes from the last checkpoint.
"""

from typing import Any

import lightning
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

import fastadv
from fastadv.data import load

EPOCHS, EPS = 8, 0.2


class AdversarialTraining(lightning.LightningModule):
    """Trains ``model`` with a method of fastadv; batches are (images, labels, rows)."""

    def __init__(self, model: torch.nn.Module, method: str, **options: Any) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.model, self.method, self.options = model, method, options
        self.saved: dict[str, Any] | None = None

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4)
        total = int(self.trainer.estimated_stepping_batches)
        return [optimizer], [torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, total)]

    def on_fit_start(self) -> None:
        # The model is on its device now. self.optimizers() is Lightning's own optimizer, which
        # counts trainer.global_step; the one that configure_optimizers made does not.
        self.step = fastadv.step(
            self.model, self.optimizers(), self.method, eps=EPS,
            num_samples=len(self.trainer.train_dataloader.dataset),
            total_steps=int(self.trainer.estimated_stepping_batches),
            steps_per_epoch=self.trainer.num_training_batches, **self.options,
        )  # fmt: skip
        if self.saved is not None:
            self.step.load_state_dict(self.saved)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> None:
        x, y, index = batch
        metrics = self.step(x, y, index=index)
        self.log_dict(dict(metrics), on_step=False, on_epoch=True, sync_dist=True)
        self.lr_schedulers().step()

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        scores = fastadv.evaluate(self.model, [batch], ("clean", "pgd-10"), eps=EPS)
        self.log_dict(dict(scores), batch_size=scores.n, prog_bar=True, sync_dist=True)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["fastadv"] = self.step.state_dict()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.saved = checkpoint["fastadv"]


def main() -> None:
    lightning.seed_everything(0)
    digits = load("digits")  # uint8 images (N,1,8,8), labels (N,)
    images, labels = digits.train_images / 255, digits.train_labels
    # The third item is the row of each image: ATTA keeps a perturbation for each of them.
    rows = TensorDataset(images[:1280], labels[:1280], torch.arange(1280))
    loader = DataLoader(rows, batch_size=64, shuffle=True)
    validation = DataLoader(TensorDataset(images[1280:], labels[1280:]), batch_size=256)
    network = fastadv.build_model(
        "preact_resnet18", width=8, in_channels=1, mean=digits.mean, std=digits.std
    )
    module = AdversarialTraining(network, "atta-1")
    keep = ModelCheckpoint("lightning", monitor="pgd-10", mode="max", save_last=True)
    trainer = lightning.Trainer(max_epochs=EPOCHS, callbacks=[keep], logger=False)
    trainer.fit(module, loader, validation, ckpt_path="last")

    test = [(digits.test_images / 255, digits.test_labels)]
    scores = fastadv.evaluate(network, test, attacks=("clean", "pgd-20"), eps=EPS)
    for attack, accuracy in scores.items():
        print(f"{attack:8}{accuracy:.1%} of {scores.n} images")


if __name__ == "__main__":
    main()
