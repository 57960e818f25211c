"""What the rows of FastAT_Benchmark compute: loops by hand in plain PyTorch, in float64.

Each function trains ``model`` on ``batches`` (x, y, index), one per update. Only noise is drawn by
fastadv's kernels, by the same names.
"""

from __future__ import annotations

import numpy as np
import torch
from single_step_formulas import Batches, boxed, descend_from, gradient, signs_of, uniform
from tiny import EPS, descend, sgd
from torch import Tensor, nn
from torch.nn import functional

from fastadv.engine import noise
from fastadv.engine.noise import Stream

START, AUGMENTATION = Stream(noise.START), Stream(noise.AUGMENTATION)


def smoothed(logits: Tensor, y: Tensor) -> Tensor:
    """The cross entropy with 0.4 of the label on all four classes."""
    return functional.cross_entropy(logits, y, label_smoothing=0.4)


def smoothed_twice(logits: Tensor, y: Tensor) -> Tensor:
    """The cross entropy with 0.6 of the label on the other three classes."""
    right = functional.one_hot(y, 4).double()
    label = right * 0.4 + (1 - right) * 0.6 / 3
    return -(label * logits.log_softmax(1)).sum(1).mean()


def noisy(x: Tensor, index: Tensor, update: int, stream: Stream, scale: float = 1.0) -> Tensor:
    drawn = uniform(index, tuple(x.shape[1:]), update, stream)
    return (x + scale * EPS * drawn).clamp(0, 1)


def zero_grad(model: nn.Module, batches: Batches, share: float) -> None:
    optimizer = sgd(model)
    for update, (x, y, index) in enumerate(batches):
        start = noisy(x, index, update, START)
        slope = gradient(lambda z, y=y: functional.cross_entropy(model(z), y), start)
        for image in slope:
            limit = np.quantile(image.abs().numpy(), share)
            image[image.abs() < limit] = 0
        x_adv = boxed(start + 2 * EPS * slope.sign(), x)
        descend(optimizer, smoothed(model(x_adv), y))


def ssat(model: nn.Module, batches: Batches, parts: int) -> list[int]:
    """Returns the number of parts of the step that each image of each update went."""
    optimizer, gone = sgd(model), []
    for update, (x, y, index) in enumerate(batches):
        start = noisy(x, index, update, START).requires_grad_()
        logits = model(start)
        (slope,) = torch.autograd.grad(smoothed(logits, y), start)
        step = boxed(start.detach() + 1.25 * EPS * slope.sign(), x) - x
        x_adv = x.clone()
        model.eval()
        for i, label in enumerate(y.tolist()):
            k = 0
            said = logits[i].argmax()
            while said == label and k < parts:
                k += 1
                x_adv[i] = x[i] + step[i] * k / parts
                with torch.no_grad():
                    said = model(x_adv[i : i + 1]).argmax()
            gone.append(k)
        model.train()
        descend(optimizer, smoothed(model(x_adv), y))
    return gone


def aaer(
    model: nn.Module, batches: Batches, fall: float, change: float, wide: bool, limit: float = 100.0
) -> tuple[list[float], list[int], list[float]]:
    """RS-AAER, and N-AAER with ``wide``. Returns the loss of each update, its number of abnormal
    examples, and by how much their logits change more than the others'."""
    optimizer, losses, counts, aways = sgd(model), [], [], []
    for update, (x, y, index) in enumerate(batches):
        stream = AUGMENTATION if wide else START
        start = noisy(x, index, update, stream, 2.0 if wide else 1.0).requires_grad_()
        before = model(start)
        (slope,) = torch.autograd.grad(functional.cross_entropy(before, y), start)
        before = before.detach()
        if wide:
            x_adv = (start.detach() + EPS * slope.sign()).clamp(0, 1)
        else:
            x_adv = boxed(start.detach() + 1.25 * EPS * slope.sign(), x)
        after = model(x_adv)
        abnormal, normal, falls = [], [], []
        for one, other, label in zip(before, after, y, strict=True):
            fell = functional.cross_entropy(one, label) - functional.cross_entropy(other, label)
            moved = ((one - other) ** 2).sum()
            (abnormal if fell > 0 else normal).append(moved)
            if fell > 0:
                falls.append(fell.item())
        loss = functional.cross_entropy(after, y)
        if abnormal and normal:
            away = sum(abnormal) / len(abnormal) - sum(normal).item() / len(normal)
            share = len(abnormal) / len(y)
            loss = loss + share * fall * sum(falls) / len(falls)
            aways.append(away.item())
            if away > 0:
                loss = loss + share * change * (away if away <= limit else limit)
        losses.append(loss.item())
        counts.append(len(abnormal))
        descend(optimizer, loss)
    return losses, counts, aways


def at_start(model: nn.Module, start: Tensor, x_adv: Tensor) -> Tensor:
    """The gradient of FGSM-PGI's regularizer at ``start``, which moves no statistics."""

    def logits(z: Tensor) -> Tensor:
        own = {name: buffer.clone() for name, buffer in model.named_buffers()}
        return torch.func.functional_call(model, own, (z,))

    end = logits(x_adv).detach()
    return gradient(lambda z: 10 * ((end - logits(z)) ** 2).mean(), start)


def universal(
    model: nn.Module, batches: Batches, initial: Stream, classes: bool, whole: bool
) -> Tensor:
    """FGSM-UAP, and FGSM-CUAP with ``classes``. The momentum follows the gradient at the start of
    the attack's loss, with ``whole`` and of the regularizer. Returns the perturbations that are
    left."""
    optimizer = sgd(model)
    groups = 4 if classes else 1
    kept = 1.25 * EPS * signs_of(uniform(torch.arange(groups), (3, 6, 6), 0, initial))
    momenta = torch.zeros_like(kept)
    for x, y, _ in batches:
        group = y.tolist() if classes else [0] * len(y)
        start = boxed(x + kept[group], x)
        slope = gradient(lambda z, y=y: smoothed(model(z), y), start)
        x_adv = boxed(start + EPS * slope.sign(), x)
        slope = slope + at_start(model, start, x_adv) if whole else slope
        descend_from(optimizer, model, start, x_adv, y, smoothed)
        unit = slope / slope.abs().sum()
        for g in set(group):
            own = [unit[i] for i in range(len(y)) if group[i] == g]
            momenta[g] = sum(own) / len(own) + 0.3 * momenta[g]
            kept[g] = (kept[g] + 1.25 * EPS * momenta[g].sign()).clamp(-1.25 * EPS, 1.25 * EPS)
    return kept


def featured(
    model: nn.Module,
    batches: Batches,
    groups: int,
    initial: Stream,
    layers: Stream,
) -> tuple[Tensor, list[Tensor], set[int]]:
    """FGSM-FUAP. Returns the perturbations and the layers that are left, and the groups seen."""
    optimizer, seen = sgd(model), set()
    kept = 1.25 * EPS * signs_of(uniform(torch.arange(groups), (3, 6, 6), 0, initial))
    momenta = torch.zeros_like(kept)
    first, second = nn.Linear(5, groups).double(), nn.Linear(groups, 4).double()
    for number, layer in enumerate((first, second)):
        size, into = layer.weight.numel(), layer.in_features
        drawn = uniform(torch.zeros(1).long(), (size + layer.out_features,), number, layers)[0]
        layer.weight.data = drawn[:size].view_as(layer.weight) / into**0.5
        layer.bias.data = drawn[size:] / into**0.5
    adam = torch.optim.Adam([*first.parameters(), *second.parameters()], lr=1e-3)
    for update, (x, y, index) in enumerate(batches):
        point = noisy(x, index, update, START)
        with torch.no_grad():
            h = model.conv1(point)
            h = h + model.conv2(functional.softplus(model.bn1(h)))
            h = 4 * torch.tanh(model.bn2(h)).mean((2, 3))
        scores = first(h)
        descend(adam, smoothed(second(scores.relu()), y))
        group = scores.argmax(1).tolist()
        seen |= {*group}
        start = boxed(point + kept[group], x)
        slope = gradient(lambda z, y=y: smoothed(model(z), y), start)
        x_adv = boxed(start + EPS * slope.sign(), x)
        slope = slope + at_start(model, start, x_adv)
        descend_from(optimizer, model, start, x_adv, y, smoothed)
        unit = slope / slope.abs().sum()
        for g in set(group):
            own = [unit[i] for i in range(len(y)) if group[i] == g]
            momenta[g] = sum(own) / len(own) + 0.3 * momenta[g]
            kept[g] = (kept[g] + 1.25 * EPS * momenta[g].sign()).clamp(-1.25 * EPS, 1.25 * EPS)
    left = [first.weight, first.bias, second.weight, second.bias]
    return kept, [tensor.detach() for tensor in left], seen


def converging(
    model: nn.Module,
    batches: Batches,
    per_epoch: int,
    stride: float,
    initial: Stream | None = None,
) -> list[float]:
    """FGSM-RS-CS, and FGSM-MEP-CS if ``initial`` is the stream of its store of 20 samples. Returns
    the sign of the term in each update."""
    optimizer, signs = sgd(model), []
    before, losses, weights = 0.0, [], []
    kept, momenta = torch.zeros(20, 3, 6, 6).double(), torch.zeros(20, 3, 6, 6).double()
    if initial is not None:
        kept = EPS * signs_of(uniform(torch.arange(20), (3, 6, 6), 0, initial))
    for update, (x, y, index) in enumerate(batches):
        epoch = update // per_epoch
        if update % per_epoch == 0 and update:
            before = sum(a * b for a, b in zip(losses, weights, strict=True)) / sum(weights)
            losses, weights = [], []
        if initial is None:
            center = noisy(x, index, update, AUGMENTATION).requires_grad_()
            natural = model(center)
            once = functional.cross_entropy(natural, y, label_smoothing=0.4)
            slope = torch.autograd.grad(once, center, retain_graph=True)[0]
            x_adv = (center.detach() + EPS * slope.sign()).clamp(0, 1)
        else:
            start = x + kept[index]
            slope = gradient(lambda z, y=y: smoothed_twice(model(z), y), start)
            x_adv = boxed(start + EPS * slope.sign(), x)
            momenta[index] = slope / slope.abs().sum() + 0.3 * momenta[index]
            kept[index] = boxed(start + EPS * momenta[index].sign(), x) - x
            natural = model(x)
        loss = smoothed_twice(model(x_adv), y)
        own = smoothed_twice(natural, y)
        losses.append(own.item())
        weights.append(len(y))
        sign = 0.0
        if 2 <= epoch < len(batches) // per_epoch - 1 and abs(own.item() - before) > stride:
            sign = 1.0 if own.item() > before else -1.0
        signs.append(sign)
        descend(optimizer, loss + sign * own)
    return signs


def pco(model: nn.Module, batches: Batches, initial: Stream, scale: float) -> Tensor:
    """FGSM-PCO, 20 samples. Returns the perturbations that are left."""
    optimizer = sgd(model)
    kept = EPS * signs_of(uniform(torch.arange(20), (3, 6, 6), 0, initial))
    for x, y, index in batches:
        start = (x + kept[index]).requires_grad_()
        first = model(start)
        (slope,) = torch.autograd.grad(smoothed_twice(first, y), start, retain_graph=True)
        stepped = boxed(start.detach() + EPS * slope.sign(), x)
        mixed = []
        for i, label in enumerate(y.tolist()):
            p = first[i].exp()[label] / first[i].exp().sum()
            mixed.append((1 - p) * start[i].detach() + p * (x[i] + scale * (stepped[i] - x[i])))
        output = model(torch.stack(mixed))
        last = model(stepped)
        changes = ((last - first) ** 2).mean() - ((last - output) ** 2).mean()
        descend(optimizer, smoothed_twice(output, y) + 10 * changes.abs())
        kept[index] = stepped - x
    return kept
