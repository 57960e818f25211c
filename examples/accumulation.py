"""Gradient accumulation with a GradScaler: TRADES in float16 on scikit-learn's digits.

Twenty seconds on a CPU; one without fp16 instructions computes in float32 and says so. Each update
is that of one call with BATCH images, in the memory of CALL images: GroupNorm normalises each image
by itself. (BatchNorm would take its statistics from each call, and a method that couples the images
of a batch is refused.)
"""

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import fastadv
from fastadv.data import load

EPOCHS, EPS, BATCH, CALL = 10, 0.2, 64, 16

torch.manual_seed(0)
device = "cuda" if torch.cuda.is_available() else "cpu"
digits = load("digits")  # uint8 images (N,1,8,8), labels (N,)
images = digits.train_images / 255
rows = TensorDataset(images, digits.train_labels, torch.arange(len(images)))
loader = DataLoader(rows, batch_size=BATCH, shuffle=True)
model = nn.Sequential(
    *(nn.Conv2d(1, 32, 3, padding=1), nn.GroupNorm(4, 32), nn.ReLU()),
    *(nn.Conv2d(32, 64, 3, stride=2, padding=1), nn.GroupNorm(8, 64), nn.ReLU()),
    *(nn.Flatten(), nn.Linear(1024, 10)),
).to(device)
optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=5e-4)
schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, EPOCHS * len(loader))
scaler = torch.amp.GradScaler(device, init_scale=1024.0)

# The step scales the loss, unscales the gradients and updates the scale: no scaler.step() here.
# Its lengths count updates, and so does the schedule. No zero_grad(): an update begins anew.
step = fastadv.step(
    model, optimizer, "trades", steps=5, eps=EPS,
    amp=True, amp_dtype="fp16", scaler=scaler, max_grad_norm=5.0,
    total_steps=EPOCHS * len(loader), steps_per_epoch=len(loader),
)  # fmt: skip

for epoch in range(EPOCHS):
    for batch in loader:
        calls = list(zip(*(part.to(device).split(CALL) for part in batch), strict=True))
        for number, (x, y, index) in enumerate(calls, start=1):
            # With index the noise of an image does not depend on the call it is in.
            metrics = step(x, y, index=index, update=number == len(calls))
        schedule.step()
    print(f"epoch {epoch + 1}/{EPOCHS}  loss {metrics['loss']:.3f}")

test = [(digits.test_images.to(device) / 255, digits.test_labels.to(device))]
scores = fastadv.evaluate(model, test, attacks=("clean", "pgd-20"), eps=EPS)
for attack, accuracy in scores.items():
    print(f"{attack:8}{accuracy:.1%} of {scores.n} images")
