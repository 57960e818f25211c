"""What GAT, NuAT, ELLE, FGSM-PGI and the random radii compute: loops by hand in plain PyTorch, in
float64.

Each function trains ``model`` on ``batches`` (x, y, index), one per update. Only noise is drawn by
fastadv's kernels, by the same names.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from scipy.stats import truncnorm
from tiny import EPS, descend, sgd
from tiny_staged import PAD, put_back, view_of, window
from torch import Tensor, nn
from torch.nn import functional

from fastadv import kernels
from fastadv.data.view import View
from fastadv.engine.noise import Stream

Batches = list[tuple[Tensor, Tensor, Tensor]]


def uniform(index: Tensor, shape: tuple[int, ...], update: int, stream: Stream) -> Tensor:
    drawn = (0, update + stream.shift, stream.number, torch.float64)
    return kernels.noise_uniform(index, shape, *drawn)


def signs_of(drawn: Tensor) -> Tensor:
    return torch.where(drawn < 0, -1.0, 1.0).double()


def boxed(moved: Tensor, x: Tensor, eps: float | Tensor = EPS) -> Tensor:
    return (x + torch.clamp(moved - x, -eps, eps)).clamp(0, 1)


def gradient(loss: Callable[[Tensor], Tensor], at: Tensor) -> Tensor:
    at = at.detach().requires_grad_()
    return torch.autograd.grad(loss(at), at)[0]


def change(first: Tensor, second: Tensor) -> Tensor:
    """The mean over the batch of the squared change of the prediction, image by image."""
    total = torch.zeros((), dtype=torch.float64)
    for one, other in zip(first, second, strict=True):
        p, q = (one.exp() / one.exp().sum()), (other.exp() / other.exp().sum())
        total = total + sum((p[k] - q[k]) ** 2 for k in range(len(p)))
    return total / len(first)


def nuclear(first: Tensor, second: Tensor) -> Tensor:
    return torch.linalg.matrix_norm(first - second, "nuc") / len(first)


def guided(
    model: nn.Module,
    batches: Batches,
    signs: Stream,
    distance: Callable[[Tensor, Tensor], Tensor],
    weight_in: Callable[[int], float],
    per_epoch: int,
    attack_bn: str = "eval",
    fit: Callable[[Tensor, Tensor], Tensor] = functional.cross_entropy,
) -> list[float]:
    """GAT and NuAT: ``weight_in`` of an epoch; ``fit`` is the loss of the label, also in the
    attack. Returns the weights of the updates."""
    optimizer, weights = sgd(model), []
    for update, (x, y, index) in enumerate(batches):
        weight = weight_in(update // per_epoch)
        weights.append(weight)
        drawn = uniform(index, tuple(x.shape[1:]), update, signs)
        start = boxed(x + EPS / 2 * signs_of(drawn), x)
        model.train()
        natural = model(x).detach()
        model.train(attack_bn == "train")
        second = update % per_epoch % 2 == 1

        def attacked(z: Tensor, second=second, y=y, natural=natural, weight=weight) -> Tensor:
            logits = model(z)
            loss = fit(logits, y)
            return loss + weight * distance(logits, natural) if second else loss

        x_adv = boxed(start + EPS * gradient(attacked, start).sign(), x)
        model.train()
        adversarial, natural = model(x_adv), model(x)
        loss = fit(natural, y) + weight * distance(adversarial, natural)
        descend(optimizer, loss)
    return weights


def elle(
    model: nn.Module,
    batches: Batches,
    streams: tuple[Stream, Stream, Stream],
    largest: float,
    sensitivity: float | None = None,
    decay: float = 1.0,
) -> list[float]:
    """ELLE-A, and ELLE if ``sensitivity`` is None. Returns the weights of the updates."""
    optimizer, weight = sgd(model), 0.0 if sensitivity is not None else largest
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
        if sensitivity is None:
            continue
        mean = sum(errors) / len(errors) if errors else 0.0
        variance = sum((e - mean) ** 2 for e in errors) / len(errors) if errors else 0.0
        jumped = len(errors) > 2 and error.item() > mean + sensitivity * math.sqrt(variance)
        weight = largest if jumped else weight * decay
        errors.append(error.item())
    return weights


def smoothed(logits: Tensor, y: Tensor) -> Tensor:
    """The cross entropy with 0.4 of the label on the other three classes."""
    right = functional.one_hot(y, 4).double()
    label = right * 0.6 + (1 - right) * 0.4 / 3
    return -(label * logits.log_softmax(1)).sum(1).mean()


def descend_from(
    optimizer: torch.optim.Optimizer,
    model: nn.Module,
    start: Tensor,
    x_adv: Tensor,
    y: Tensor,
    fit: Callable[[Tensor, Tensor], Tensor] = smoothed,
) -> None:
    """One update of FGSM-PGI, with the loss ``fit``. The pass at the start was that of the attack:
    BatchNorm's statistics move by it once, and before the pass at ``x_adv``."""
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    adversarial = model(x_adv)
    after = {name: buffer.clone() for name, buffer in model.named_buffers()}
    # A copy with equal weights: the second pass at the start leaves no trace in the model.
    plain = {name: buffer.clone() for name, buffer in before.items()}
    first = torch.func.functional_call(model, plain, (start,))
    descend(optimizer, fit(adversarial, y) + 10 * ((adversarial - first) ** 2).mean())
    for name, buffer in model.named_buffers():
        assert torch.equal(buffer, after[name])


def fgsm_mep(
    model: nn.Module,
    batches: Batches,
    initial: Stream,
    reset_every: int,
    decay: float = 0.3,
    crops: bool = False,
    clip: bool = False,
) -> None:
    """One epoch per update, 20 samples; FGSM-EP with ``decay`` 0. With ``crops`` what is stored
    moves with the image; with ``clip`` the gradient is taken at an image."""
    optimizer = sgd(model)
    size = 6 + 2 * PAD if crops else 6
    rows, room = torch.arange(20), (3, size, size)
    still = View(torch.zeros(20).long(), torch.zeros(20).long(), torch.zeros(20).bool())
    for update, (x, y, index) in enumerate(batches):
        view = view_of(len(y), update) if crops else still
        if update % reset_every == 0:
            drawn = uniform(rows, room, update // reset_every, initial)
            kept, momenta = EPS * signs_of(drawn), torch.zeros(20, *room).double()
        places = list(enumerate(index.tolist()))
        delta = torch.stack([window(kept[sample], view, row) for row, sample in places])
        momentum = torch.stack([window(momenta[sample], view, row) for row, sample in places])
        start = x + delta
        at = start.clamp(0, 1) if clip else start
        slope = gradient(lambda z, y=y: smoothed(model(z), y), at)
        momentum = slope / slope.abs().sum() + decay * momentum
        x_adv = boxed(start + EPS * slope.sign(), x)
        later = boxed(start + EPS * momentum.sign(), x) - x
        descend_from(optimizer, model, at, x_adv, y)
        for row, sample in places:
            put_back(kept[sample], view, row, later[row])
            put_back(momenta[sample], view, row, momentum[row])


def fgsm_bp(model: nn.Module, batches: Batches, initial: Stream) -> Tensor:
    """Returns the perturbations that are left, one for each place in the largest batch."""
    optimizer = sgd(model)
    places = torch.arange(max(len(y) for _, y, _ in batches))
    kept = EPS * signs_of(uniform(places, (3, 6, 6), 0, initial))
    for x, y, _ in batches:
        start = x + kept[: len(y)]
        slope = gradient(lambda z, y=y: smoothed(model(z), y), start)
        x_adv = boxed(start + EPS * slope.sign(), x)
        kept[: len(y)] = x_adv - x
        descend_from(optimizer, model, start, x_adv, y)
    return kept


def random_eps(model: nn.Module, batches: Batches, radius: Stream) -> None:
    optimizer = sgd(model)
    for update, (x, y, index) in enumerate(batches):
        share = (uniform(index, (1,), update, radius) + 1) / 2
        eps = torch.tensor(EPS / 2 * truncnorm(0, 2).ppf(share.numpy())).view(-1, 1, 1, 1)
        model.eval()
        slope = gradient(lambda z, y=y: functional.cross_entropy(model(z), y), x)
        model.train()
        x_adv = (x + eps * slope.sign()).clamp(0, 1)
        descend(optimizer, functional.cross_entropy(model(x_adv), y))


def random_eps_pgd(
    model: nn.Module, batches: Batches, radius: Stream, per_epoch: int, ramp: float, steps: int
) -> None:
    """In the training mode of BatchNorm; eps rises over ``ramp`` epochs."""
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
