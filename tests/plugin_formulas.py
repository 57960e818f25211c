"""What the example plugins compute, written as loops by hand in plain PyTorch, in float64.

Each function trains ``model`` on ``batches`` (x, y, index), one per update. Only noise is drawn by
fastadv's kernels, by the same names.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from tiny import EPS, descend, sgd
from tiny_staged import PAD, put_back, view_of, window
from torch import Tensor, nn
from torch.nn import functional

from fastadv import kernels
from fastadv.engine.noise import Stream

Batches = list[tuple[Tensor, Tensor, Tensor]]


def uniform(index: Tensor, shape: tuple[int, ...], update: int, stream: Stream) -> Tensor:
    drawn = (0, update + stream.shift, stream.number, torch.float64)
    return kernels.noise_uniform(index, shape, *drawn)


def boxed(moved: Tensor, x: Tensor, eps: float | Tensor = EPS) -> Tensor:
    return (x + torch.clamp(moved - x, -eps, eps)).clamp(0, 1)


def gradient(loss: Callable[[Tensor], Tensor], at: Tensor) -> Tensor:
    at = at.detach().requires_grad_()
    return torch.autograd.grad(loss(at), at)[0]


def mart(model: nn.Module, batches: Batches, beta: float, steps: int, alpha: float) -> None:
    optimizer = sgd(model)
    for update, (x, y, index) in enumerate(batches):
        model.eval()
        drawn = kernels.noise_normal(index, tuple(x.shape[1:]), 0, update, 0, torch.float64)
        x_adv = x + 0.001 * drawn
        for _ in range(steps):
            slope = gradient(lambda z, y=y: functional.cross_entropy(model(z), y), x_adv)
            x_adv = boxed(x_adv + alpha * slope.sign(), x)
        model.train()
        p = torch.softmax(model(x), 1)
        q = torch.softmax(model(x_adv), 1)
        total = torch.zeros(())
        for i, label in enumerate(y.tolist()):
            wrong = max(q[i, k] for k in range(q.shape[1]) if k != label)
            boosted = -q[i, label].log() - (1.0001 - wrong + 1e-12).log()
            kl = sum(p[i, k] * (p[i, k].log() - (q[i, k] + 1e-12).log()) for k in range(q.shape[1]))
            total = total + boosted + beta * kl * (1.0000001 - p[i, label])
        descend(optimizer, total / len(y))


def nuat(model: nn.Module, batches: Batches, signs: Stream) -> list[float]:
    """One epoch per update, of as many as there are batches. Returns the weights of the norm."""
    optimizer, weights = sgd(model), []
    for update, (x, y, index) in enumerate(batches):
        weight = 4.5 * min(update / (0.9 * len(batches)), 1)
        weights.append(weight)
        drawn = uniform(index, tuple(x.shape[1:]), update, signs)
        start = boxed(x + EPS / 2 * torch.sign(drawn + 1e-30), x)
        model.eval()
        natural = model(x).detach()

        def attacked(z: Tensor, update=update, y=y, natural=natural, weight=weight) -> Tensor:
            logits = model(z)
            norm = torch.linalg.matrix_norm(natural - logits, "nuc") / len(y)
            return functional.cross_entropy(logits, y) + (weight * norm if update % 2 else 0)

        x_adv = boxed(start + EPS * gradient(attacked, start).sign(), x)
        model.train()
        with torch.no_grad():
            model(x)
        adversarial, natural = model(x_adv), model(x)
        norm = torch.linalg.matrix_norm(natural - adversarial, "nuc") / len(y)
        descend(optimizer, functional.cross_entropy(natural, y) + weight * norm)
    return weights


def elle_a(
    model: nn.Module,
    batches: Batches,
    streams: tuple[Stream, Stream, Stream],
    largest: float,
    sensitivity: float,
    decay: float,
) -> list[float]:
    """Returns the weights of the updates."""
    optimizer, weight = sgd(model), 0.0
    errors: list[float] = []
    weights: list[float] = []
    for update, (x, y, index) in enumerate(batches):
        slope = gradient(lambda z, y=y: functional.cross_entropy(model(z), y), x)
        loss = functional.cross_entropy(model((x + EPS * slope.sign()).clamp(0, 1)), y)
        shape = tuple(x.shape[1:])
        x_a = x + EPS * uniform(index, shape, update, streams[0])
        x_b = x + EPS * uniform(index, shape, update, streams[1])
        t = (uniform(index, (1,), update, streams[2]) + 1) / 2
        x_c = (1 - t.view(-1, 1, 1, 1)) * x_a + t.view(-1, 1, 1, 1) * x_b
        right = model(torch.cat([x_a, x_b, x_c])).log_softmax(1)[torch.arange(3 * len(y)), [*y] * 3]
        a, b, c = -right.view(3, -1)
        error = ((c - (1 - t[:, 0]) * a - t[:, 0] * b) ** 2).mean()
        weights.append(weight)
        descend(optimizer, loss + weight * error)
        mean = sum(errors) / len(errors) if errors else 0.0
        variance = sum((e - mean) ** 2 for e in errors) / len(errors) if errors else 0.0
        jumped = len(errors) > 2 and error.item() > mean + sensitivity * math.sqrt(variance)
        weight = largest if jumped else weight * decay
        errors.append(error.item())
    return weights


def fgsm_mep(model: nn.Module, batches: Batches, initial: Stream, reset_every: int) -> None:
    """One epoch per update; the label smoothed by 0.4, 20 samples."""
    optimizer = sgd(model)
    rows, padded = torch.arange(20), (3, 6 + 2 * PAD, 6 + 2 * PAD)

    def fit(logits: Tensor, y: Tensor) -> Tensor:
        right = functional.one_hot(y, 4).double()
        label = right * 0.6 + (1 - right) * 0.4 / 3
        return -(label * logits.log_softmax(1)).sum(1).mean()

    for update, (x, y, index) in enumerate(batches):
        view = view_of(len(y), update)
        if update % reset_every == 0:
            drawn = uniform(rows, padded, update // reset_every, initial)
            kept, momenta = EPS * torch.sign(drawn + 1e-30), torch.zeros(20, *padded).double()
        places = list(enumerate(index.tolist()))
        delta = torch.stack([window(kept[sample], view, row) for row, sample in places])
        momentum = torch.stack([window(momenta[sample], view, row) for row, sample in places])
        start = x + delta
        slope = gradient(lambda z, y=y: fit(model(z), y), start)
        momentum = slope / slope.abs().sum() + 0.3 * momentum
        x_adv = boxed(start + EPS * slope.sign(), x)
        later = boxed(start + EPS * momentum.sign(), x) - x
        adversarial, first = model(x_adv), model(start)
        descend(optimizer, fit(adversarial, y) + 10 * ((adversarial - first) ** 2).mean())
        for row, sample in places:
            put_back(kept[sample], view, row, later[row])
            put_back(momenta[sample], view, row, momentum[row])


def eps_ramp(
    model: nn.Module, batches: Batches, radius: Stream, per_epoch: int, ramp: float, steps: int
) -> None:
    optimizer = sgd(model)
    for update, (x, y, index) in enumerate(batches):
        share = min(update / per_epoch / ramp, 1)
        eps = share * EPS * (uniform(index, (1,), update, radius) + 1) / 2
        eps = eps.view(-1, 1, 1, 1)
        x_adv = (x + eps * uniform(index, tuple(x.shape[1:]), update, Stream(0))).clamp(0, 1)
        for _ in range(steps):
            slope = gradient(lambda z, y=y: functional.cross_entropy(model(z), y), x_adv)
            x_adv = boxed(x_adv + eps / 4 * slope.sign(), x, eps)
        descend(optimizer, functional.cross_entropy(model(x_adv), y))
