"""Adversarial training in your own loop: APART on scikit-learn's digits.

Fifteen seconds on a CPU. Interrupt it and start it again: it resumes from own_loop.pt and ends with
the same weights bit for bit.
"""

from pathlib import Path

import torch
from torch.utils.data import DataLoader, TensorDataset

import fastadv
from fastadv.data import load

EPOCHS, EPS, CHECKPOINT = 12, 0.2, Path("own_loop.pt")

torch.manual_seed(0)
digits = load("digits")  # uint8 images (N,1,8,8), labels (N,)
images = digits.train_images / 255  # fastadv takes pixels in [0,1]: the model normalises them
loader = DataLoader(  # the third item is the row of each image: APART keeps a perturbation for each
    TensorDataset(images, digits.train_labels, torch.arange(len(images))),
    batch_size=64,
    shuffle=True,
)
model = fastadv.build_model(  # or any torch.nn.Module
    "preact_resnet18", width=8, in_channels=1, mean=digits.mean, std=digits.std
)
optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4)
total = EPOCHS * len(loader)
schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.3, total_steps=total)
step = fastadv.step(
    model, optimizer, "apart", eps=EPS,
    num_samples=len(images), total_steps=total, steps_per_epoch=len(loader),
)  # fmt: skip

begin, resumable = 0, {"model": model, "optimizer": optimizer, "schedule": schedule, "step": step}
if CHECKPOINT.exists():
    saved = torch.load(CHECKPOINT)
    begin = saved.pop("epoch")
    for name, state in saved.items():
        resumable[name].load_state_dict(state)

for epoch in range(begin, EPOCHS):
    torch.manual_seed(epoch)  # the order of the images depends on the epoch alone
    for x, y, index in loader:
        metrics = step(x, y, index=index)  # in place of loss.backward() and optimizer.step()
        schedule.step()
    print(f"epoch {epoch + 1}/{EPOCHS}  loss {metrics['loss']:.3f}")
    states = {name: thing.state_dict() for name, thing in resumable.items()}
    torch.save(states | {"epoch": epoch + 1}, CHECKPOINT)

test = [(digits.test_images / 255, digits.test_labels)]
scores = fastadv.evaluate(model, test, attacks=("clean", "pgd-20"), eps=EPS)
for attack, accuracy in scores.items():
    print(f"{attack:8}{accuracy:.1%} of {scores.n} images")
