"""What the methods of ``recipes/distances.py`` compute, as loops by hand in plain PyTorch, in
float64. Only noise is drawn by fastadv's kernels, by the same names.
"""

from __future__ import annotations

import torch
from tiny import descend, sgd
from torch import Tensor, nn
from torch.nn import functional

from fastadv import kernels
from fastadv.engine.noise import NEIGHBOR, Stream

Batches = list[tuple[Tensor, Tensor, Tensor]]
CLASSES = 4


def share(index: Tensor, shape: tuple[int, ...], update: int, stream: Stream) -> Tensor:
    """Uniform in [0,1)."""
    drawn = kernels.noise_uniform(
        index, shape, 0, update + stream.shift, stream.number, torch.float64
    )
    return (drawn + 1) / 2


def boxed(moved: Tensor, x: Tensor, eps: float) -> Tensor:
    return (x + (moved - x).clamp(-eps, eps)).clamp(0, 1)


def slope(loss: Tensor, at: Tensor, **options: bool) -> Tensor:
    return torch.autograd.grad(loss, at, **options)[0]


def smoothed(drawn: Tensor, y: Tensor, taken: float) -> Tensor:
    """The label of each row, its taken part split by ``drawn`` among the wrong classes."""
    rows = []
    for row, label in zip(drawn, y.tolist(), strict=True):
        total = sum(row[k] for k in range(CLASSES) if k != label)
        parts = [1 - taken if k == label else taken * row[k] / total for k in range(CLASSES)]
        rows.append(torch.stack([torch.as_tensor(part, dtype=torch.float64) for part in parts]))
    return torch.stack(rows)


def fitted(logits: Tensor, label: Tensor) -> Tensor:
    return -(label * logits.log_softmax(1)).sum(1).mean()


def mart(
    model: nn.Module, batches: Batches, eps: float, beta: float, steps: int, alpha: float
) -> None:
    optimizer = sgd(model)
    for update, (x, y, index) in enumerate(batches):
        model.eval()
        drawn = kernels.noise_normal(index, tuple(x.shape[1:]), 0, update, 0, torch.float64)
        x_adv = x + 0.001 * drawn
        for _ in range(steps):
            x_adv = x_adv.detach().requires_grad_()
            loss = functional.cross_entropy(model(x_adv), y)
            x_adv = boxed(x_adv + alpha * slope(loss, x_adv).sign(), x, eps)
        model.train()
        p = torch.softmax(model(x), 1)
        q = torch.softmax(model(x_adv.detach()), 1)
        total = torch.zeros(())
        for i, label in enumerate(y.tolist()):
            wrong = max(q[i, k] for k in range(q.shape[1]) if k != label)
            boosted = -q[i, label].log() - (1.0001 - wrong + 1e-12).log()
            kl = sum(p[i, k] * (p[i, k].log() - (q[i, k] + 1e-12).log()) for k in range(q.shape[1]))
            total = total + boosted + beta * kl * (1.0000001 - p[i, label])
        descend(optimizer, total / len(y))


def liet(
    model: nn.Module,
    batches: Batches,
    streams: dict[str, Stream],
    eps: float,
    weight: float,
    per_epoch: int,
    renew_every: int,
    wide: bool,
) -> list[Tensor]:
    """Returns the label information of each update."""
    optimizer, seen, epochs = sgd(model), [], len(batches) / per_epoch
    classes, one = torch.arange(CLASSES), torch.zeros(1, dtype=torch.int64)
    for update, (x, y, index) in enumerate(batches):
        shape = tuple(x.shape[1:])
        if update % per_epoch % renew_every == 0:
            model.eval()
            grey = torch.full((CLASSES, *shape), 0.5).double().requires_grad_()
            own = share(classes, (CLASSES,), update + NEIGHBOR, streams["attack"])
            label = smoothed(own, classes, 0.6)
            information = eps * slope(fitted(model(grey), label), grey).sign()
            model.train()
        seen.append(information)
        ratio = 0.1 + 0.4 * share(one, (1,), update, streams["ratio"]).item()
        side = -1 if share(one, (1,), update, streams["side"]).item() < 0.5 else 1
        noise = eps * (2 * share(index, shape, update, streams["noise"]) - 1) * (2 if wide else 1)
        masked = share(index, shape, update, streams["mask"]) < ratio
        delta = torch.stack([information[label] for label in y.tolist()])
        delta[masked] = noise[masked]
        start = (x + side * delta).clamp(0, 1).requires_grad_()
        first = model(start)
        label = smoothed(share(index, (CLASSES,), update, streams["attack"]), y, 0.6)
        moved = start + eps * slope(fitted(first, label), start, retain_graph=True).sign()
        x_adv = (moved.clamp(0, 1) if wide else boxed(moved, x, eps)).detach()
        second = model(x_adv)
        label = smoothed(share(index, (CLASSES,), update, streams["outer"]), y, 0.6)
        p, q = first.softmax(1), second.softmax(1)
        m = ((p + q) / 2).log()
        both = functional.kl_div(m, p, reduction="batchmean")
        both = (both + functional.kl_div(m, q, reduction="batchmean")) / 2
        now = weight * (update // per_epoch + 1) / epochs
        descend(optimizer, fitted(second, label) + now * both)
    return seen


def ikl(
    model: nn.Module, batches: Batches, eps: float, steps: int, alpha: float, per_epoch: int
) -> tuple[list[Tensor], Tensor]:
    """Returns the weights of the classes in each epoch, and the sums of the last one."""
    optimizer = sgd(model)
    weights, seen = torch.full((CLASSES, CLASSES), 1 / CLASSES).double(), []
    sums = torch.zeros(CLASSES, CLASSES).double()
    for update, (x, y, index) in enumerate(batches):
        if update % per_epoch == 0:
            for label in range(CLASSES if update else 0):
                if sums[label].sum() > 0:
                    weights[label] = sums[label] / sums[label].sum()
            sums = torch.zeros(CLASSES, CLASSES).double()
            seen.append(weights.clone())
        model.eval()
        drawn = kernels.noise_normal(index, tuple(x.shape[1:]), 0, update, 0, torch.float64)
        x_adv, p = x + 0.001 * drawn, model(x).softmax(1).detach()
        for _ in range(steps):
            x_adv = x_adv.detach().requires_grad_()
            loss = -(p * model(x_adv).log_softmax(1)).sum(1).mean()
            x_adv = boxed(x_adv + alpha * slope(loss, x_adv).sign(), x, eps)
        model.train()
        adversarial, natural = model(x_adv.detach()), model(x)
        total = functional.cross_entropy(natural, y)
        for row, label in enumerate(y.tolist()):
            p = natural[row].softmax(0).detach()
            squares = 0
            for j in range(CLASSES):
                for k in range(CLASSES):
                    change = natural[row, j] - natural[row, k]
                    change = change - (adversarial[row, j] - adversarial[row, k])
                    squares = squares + weights[label, j] * weights[label, k] * change**2
            crossed = -(p * adversarial[row].log_softmax(0)).sum()
            total = total + (3 * crossed + 7 * squares / 4) / len(y)
            sums[label] += (natural[row].detach() / 2).softmax(0)
        descend(optimizer, total)
    return seen, sums


def hat(
    model: nn.Module, helper: nn.Module, batches: Batches, eps: float, steps: int, alpha: float
) -> None:
    optimizer = sgd(model)
    for update, (x, y, index) in enumerate(batches):
        model.eval()
        drawn = kernels.noise_normal(index, tuple(x.shape[1:]), 0, update, 0, torch.float64)
        x_adv, p = x + 0.001 * drawn, model(x).softmax(1).detach()
        for _ in range(steps):
            x_adv = x_adv.detach().requires_grad_()
            loss = functional.kl_div(model(x_adv).log_softmax(1), p, reduction="sum")
            x_adv = boxed(x_adv + alpha * slope(loss, x_adv).sign(), x, eps)
        model.train()
        x_adv = x_adv.detach()
        natural, adversarial, beyond = model(x), model(x_adv), model(x + 3 * (x_adv - x))
        labels = helper(x_adv).argmax(1)
        total = functional.cross_entropy(natural, y)
        robust = functional.kl_div(
            adversarial.log_softmax(1), natural.softmax(1), reduction="batchmean"
        )
        total = total + 2.5 * robust + 0.7 * functional.cross_entropy(beyond, labels)
        descend(optimizer, total)
