"""Adversarial training of a timm model: a small ConvNeXt with F+FGSM on scikit-learn's digits.

Fifteen seconds on a CPU.
"""

import timm.optim
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import fastadv
from fastadv.data import load
from fastadv.models import Normalize

EPOCHS, EPS, RATE = 8, 0.2, 2e-3

torch.manual_seed(0)
digits = load("digits")  # uint8 images (N,1,8,8), labels (N,)
loader = DataLoader(
    TensorDataset(digits.train_images / 255, digits.train_labels), batch_size=64, shuffle=True
)
# dims, depths and patch_size make it small, for images of 8x8 pixels.
network = timm.create_model(
    "convnext_atto", num_classes=10, in_chans=1, dims=(16, 32, 64, 128), depths=(1, 1, 2, 1),
    patch_size=1,
)  # fmt: skip
# The attack moves pixels in [0,1], so the normalisation is a layer in front of the network, not one
# of timm's transforms. With pretrained=True take mean and std of network.pretrained_cfg.
model = nn.Sequential(Normalize(digits.mean, digits.std), network)

optimizer = timm.optim.create_optimizer_v2(model, opt="adamw", lr=RATE, weight_decay=0.05)
total = EPOCHS * len(loader)
schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, total_steps=total)
step = fastadv.step(
    model, optimizer, "fast", eps=EPS, total_steps=total, steps_per_epoch=len(loader)
)

for epoch in range(EPOCHS):
    for x, y in loader:
        metrics = step(x, y)
        schedule.step()
    print(f"epoch {epoch + 1}/{EPOCHS}  loss {metrics['loss']:.3f}")

test = [(digits.test_images / 255, digits.test_labels)]
scores = fastadv.evaluate(model, test, attacks=("clean", "pgd-20"), eps=EPS)
for attack, accuracy in scores.items():
    print(f"{attack:8}{accuracy:.1%} of {scores.n} images")
