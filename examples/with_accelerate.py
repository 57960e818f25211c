"""Adversarial training with Hugging Face accelerate: PGD with averaged weights on digits.

Twenty seconds on a CPU. `python with_accelerate.py` runs one process, and
`accelerate launch with_accelerate.py` the devices, processes and precision of `accelerate config`.
"""

import torch
from accelerate import Accelerator
from torch.utils.data import DataLoader, TensorDataset

import fastadv
from fastadv.data import load

EPOCHS, EPS = 6, 0.2

accelerator = Accelerator()
torch.manual_seed(0)
digits = load("digits")  # uint8 images (N,1,8,8), labels (N,)
loader = DataLoader(
    TensorDataset(digits.train_images / 255, digits.train_labels), batch_size=64, shuffle=True
)
test = [(digits.test_images / 255, digits.test_labels)]
model = fastadv.build_model(
    "preact_resnet18", width=8, in_channels=1, mean=digits.mean, std=digits.std
)
optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4)
schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, EPOCHS * len(loader))
model, optimizer, loader, schedule = accelerator.prepare(model, optimizer, loader, schedule)

# The step takes what accelerate prepared. It computes the gradients and averages them over the
# processes: it replaces accelerator.backward; max_grad_norm= replaces accelerator.clip_grad_norm_.
step = fastadv.step(
    model, optimizer, "pgd", steps=4, averaging="ema", eps=EPS,
    steps_per_epoch=len(loader), total_steps=EPOCHS * len(loader),
)  # fmt: skip

for epoch in range(EPOCHS):
    for x, y in loader:
        metrics = step(x, y)  # in accelerator.accumulate(model): update=accelerator.sync_gradients
        schedule.step()
    accelerator.print(f"epoch {epoch + 1}/{EPOCHS}  loss {metrics['loss']:.3f}")

with step.evaluation_weights():
    # shared: each process evaluates a part of the batches, and all of them get the result.
    scores = fastadv.evaluate(model, test, ("clean", "pgd-20"), eps=EPS, shared=True)
for attack, accuracy in scores.items():
    accelerator.print(f"{attack:8}{accuracy:.1%} of {scores.n} images")
