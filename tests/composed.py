"""One training step of any combination in the grid, composed from formulas written here."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field

import torch
from tiny import CLASSES, EPS, TinyNet, sgd
from torch import Tensor
from torch.nn import functional

BETA, SMOOTHING, TE_WEIGHT, TE_MOMENTUM = 6.0, 0.2, 5.0, 0.9
LC_WEIGHT, LC_SHARE, GAMMA, C_MIN, WEIGHT_STEPS = 0.6, 0.25, 0.02, 1.9, 3
PGD_STEPS, PGD_ALPHA = 3, 0.04
STEP_SIZES = {"input": 0.03, "omega": 0.5, "block": 0.02}
STEP_LR, STEP_DECAY = 0.01, 0.3

OPTIONS = {
    "pgd": {"steps": PGD_STEPS, "alpha": PGD_ALPHA},
    "fast": {},
    "fgsm-n": {},
    "atta": {"pad": 0},
    "apart": {
        "pad": 0,
        "step_size_init": STEP_SIZES["input"],
        "omega_rate_init": STEP_SIZES["omega"],
        "block_step_init": STEP_SIZES["block"],
        "step_size_lr": STEP_LR,
        "step_size_decay": STEP_DECAY,
        "step_size_schedule": "constant",
    },
    "label-smoothing": {"smoothing": SMOOTHING},
    "temporal-ensembling": {
        "te_weight": TE_WEIGHT,
        "te_momentum": TE_MOMENTUM,
        "te_start": 0,
        "te_end": 0,
    },
    "advlc": {"reg_weight": LC_WEIGHT, "top_fraction": LC_SHARE},
    "awp": {"gamma": GAMMA, "warmup_epochs": 0},
    "rwp": {"gamma": GAMMA, "warmup_epochs": 0, "c_min": C_MIN, "weight_steps": WEIGHT_STEPS},
    "swa": {"average_start": 0},
}


def ce(logits: Tensor, y: Tensor) -> Tensor:
    return functional.cross_entropy(logits, y, reduction="none")


def kl(logits_p: Tensor, logits_q: Tensor) -> Tensor:
    p = torch.softmax(logits_p, 1)
    return (p * (p / torch.softmax(logits_q, 1)).log()).sum(1)


def box(x: Tensor) -> Tensor:
    return x.clamp(0, 1)


def ball(delta: Tensor) -> Tensor:
    return delta.clamp(-EPS, EPS)


def forward(model: TinyNet, x: Tensor, noise: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Logits, and what enters the block's first convolution; ``noise`` is added there."""
    x = model.conv1(x)
    entering = functional.softplus(model.bn1(x))
    x = x + model.conv2(entering if noise is None else entering + noise)
    return model.linear(4 * torch.tanh(model.bn2(x)).mean((2, 3))), entering


@dataclass
class Composed:
    """The state of one combination of slots, and its step."""

    model: TinyNet
    slots: dict[str, str]
    predictions: Tensor = field(default_factory=lambda: torch.zeros(20, CLASSES).double())
    kept: Tensor | None = None  # what ATTA keeps, or APART's omega, for the batch's samples
    step_sizes: Tensor | None = None
    average: list[Tensor] | None = None
    joint: Tensor | None = None  # f(centre) of FGSM-N's only forward pass; its graph is kept

    @property
    def joins(self) -> bool:
        """FGSM-N and AdvLC forward the noisy image once, for the attack and the loss."""
        wanted = {"adversary": "fgsm-n", "objective": "ce", "regularizer": "advlc"}
        return self.slots | wanted | {"weights": "none"} == self.slots

    @property
    def trades(self) -> bool:
        return self.slots["objective"] == "trades"

    @property
    def ensembles(self) -> bool:
        return self.slots["target"] == "temporal-ensembling"

    def step(self, x: Tensor, y: Tensor, index: Tensor, start: Tensor) -> None:
        self.x, self.y = x, y
        optimizer = sgd(self.model)
        self._predict(index)
        center, x_adv, sizes, sign = self._attack(start)
        weights = [self.model.conv1.weight, self.model.conv2.weight, self.model.linear.weight]
        moved = []
        if self.slots["weights"] != "none":
            moved = self._perturbed(weights, center, x_adv, sign)
        with torch.no_grad():
            for weight, move in zip(weights, moved, strict=False):
                weight += move
        noise = None if sign is None else sizes[2] * sign
        if not x_adv.requires_grad:
            x_adv = x_adv.requires_grad_()
        x_adv.retain_grad()
        statistics = self._statistics(center, x_adv.detach(), noise)
        losses, natural, adversarial = self._losses(center, x_adv, noise)
        loss = losses.mean()
        if self.slots["regularizer"] == "advlc":
            change = (natural - adversarial).abs().flatten()
            largest = change.topk(int(LC_SHARE * change.numel())).values
            loss = loss + LC_WEIGHT * largest.sum() / len(y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        self.model.load_state_dict(statistics, strict=False)
        with torch.no_grad():
            for weight, move in zip(weights, moved, strict=False):
                weight -= move
            self._remember(x_adv, sizes, start)
            if self.slots["averaging"] == "swa":
                self.average = [weight.clone() for weight in self.model.parameters()]

    def _predict(self, index: Tensor) -> None:
        self.model.eval()
        with torch.no_grad():
            self.natural = self.model(self.x)
        self.model.train()
        if self.ensembles:
            new = TE_MOMENTUM * self.predictions[index] + (1 - TE_MOMENTUM) * self.natural.softmax(
                1
            )
            self.predictions[index] = new
            self.prediction = new / new.sum(1, keepdim=True)

    def _te(self, logits: Tensor) -> Tensor:
        if not self.ensembles:
            return torch.zeros(len(logits)).double()
        return TE_WEIGHT * (logits.softmax(1) - self.prediction).pow(2).sum(1)

    def _attacked(self, logits: Tensor) -> Tensor:
        """What the attack maximises."""
        loss = BETA * kl(self.natural, logits) if self.trades else ce(logits, self.y)
        return (loss + self._te(logits)).mean()

    def _ascend(self, x_adv: Tensor, center: Tensor, alpha: float) -> Tensor:
        x_adv = x_adv.detach().requires_grad_()
        (gradient,) = torch.autograd.grad(self._attacked(self.model(x_adv)), x_adv)
        return box(center + ball(x_adv.detach() + alpha * gradient.sign() - center))

    def _joint_step(self, center: Tensor) -> Tensor:
        noisy = center.clone().requires_grad_()
        self.joint = self.model(noisy)
        (gradient,) = torch.autograd.grad(self._attacked(self.joint), noisy, retain_graph=True)
        return box(center + EPS * gradient.sign())

    def _attack(self, start: Tensor) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
        """Centre, x_adv, APART's step sizes and the sign of its block gradient."""
        adversary = self.slots["adversary"]
        self.model.train(not self.trades and adversary != "atta")
        begin = box(self.x + ball(start))
        center, sizes, sign = self.x, None, None
        if adversary == "pgd":
            for _ in range(PGD_STEPS):
                begin = self._ascend(begin, center, PGD_ALPHA)
        elif adversary == "fast":
            begin = self._ascend(begin, center, 1.25 * EPS)
        elif adversary == "fgsm-n":
            center = begin
            begin = self._joint_step(center) if self.joins else self._ascend(begin, center, EPS)
        elif adversary == "atta":
            begin = self._ascend(begin, center, 0.015 / 0.031 * EPS)
        else:
            begin, sizes, sign = self._apart(start)
        self.model.train()
        return center, begin, sizes, sign

    def _apart(self, start: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        values = [STEP_SIZES[name] for name in ("input", "omega", "block")]
        sizes = torch.tensor(values, dtype=torch.float64).requires_grad_()
        omega = start / STEP_SIZES["omega"]
        x0 = box(self.x + ball(STEP_SIZES["omega"] * omega)).requires_grad_()
        logits, entering = forward(self.model, x0)
        found = torch.autograd.grad(self._attacked(logits), [x0, entering])
        delta = ball(ball(sizes[1] * omega) + sizes[0] * found[0].sign())
        return box(self.x + delta), sizes, found[1].sign()

    def _losses(
        self, center: Tensor, x_adv: Tensor, noise: Tensor | None
    ) -> tuple[Tensor, Tensor | None, Tensor]:
        natural = None
        if self.trades or self.slots["regularizer"] == "advlc":
            natural = self.model(center) if self.joint is None else self.joint
        adversarial, _ = forward(self.model, x_adv, noise)
        fitted = natural if self.trades else adversarial
        losses = self._fit(fitted) + self._te(fitted)
        if self.trades:
            losses = losses + BETA * kl(natural, adversarial)
        return losses, natural, adversarial

    @torch.no_grad()
    def _statistics(self, center: Tensor, x_adv: Tensor, noise: Tensor | None) -> dict[str, Tensor]:
        """BatchNorm statistics after an outer pass of TRADES, which forwards x, x', x; with AWP x',
        x, x; with TE x, x'."""
        if not self.trades:
            return {}
        model = copy.deepcopy(self.model)
        perturbed = self.slots["weights"] != "none"
        if not perturbed:
            model(center)
        forward(model, x_adv, noise)
        if perturbed or not self.ensembles:
            model(center)
        if perturbed:
            model(center)
        return dict(model.named_buffers())

    def _fit(self, logits: Tensor) -> Tensor:
        if self.slots["target"] != "label-smoothing":
            return ce(logits, self.y)
        soft = torch.full_like(logits, SMOOTHING / (CLASSES - 1))
        soft[torch.arange(len(self.y)), self.y] = 1 - SMOOTHING
        return -(soft * logits.log_softmax(1)).sum(1)

    def _perturbed(
        self, weights: list[Tensor], center: Tensor, x_adv: Tensor, sign: Tensor | None
    ) -> list[Tensor]:
        """v of AWP or RWP, one tensor per weight; buffers and weights are left as they were."""
        kind = self.slots["weights"]
        moved = []
        noise = None if sign is None else STEP_SIZES["block"] * sign
        buffers = {name: value.clone() for name, value in self.model.named_buffers()}
        start = [weight.detach().clone() for weight in weights]
        total = [torch.zeros_like(weight) for weight in weights]
        for _ in range(1 if kind == "awp" else WEIGHT_STEPS):
            losses, _, _ = self._losses(center, x_adv.detach(), noise)
            taken = losses if kind == "awp" else losses[losses <= C_MIN]
            found = torch.autograd.grad(taken.sum() / len(losses), weights)
            total = [a + b for a, b in zip(total, found, strict=True)]
            moved = perturbation(start, total, per_tensor=kind == "awp")
            with torch.no_grad():
                for weight, begin, move in zip(weights, start, moved, strict=True):
                    weight.copy_(begin + move)
        with torch.no_grad():
            for weight, begin in zip(weights, start, strict=True):
                weight.copy_(begin)
            for name, value in self.model.named_buffers():
                value.copy_(buffers[name])
        return moved

    def _remember(self, x_adv: Tensor, sizes: Tensor | None, start: Tensor) -> None:
        if self.slots["adversary"] == "atta":
            self.kept = x_adv - self.x
        if sizes is not None:
            ratio = STEP_SIZES["input"] / (STEP_SIZES["omega"] + 1e-7)
            omega = start / STEP_SIZES["omega"] + ratio * x_adv.grad.sign()
            self.kept = omega.clamp(-1, 1)
            self.step_sizes = sizes + STEP_LR * (sizes.grad - STEP_DECAY * sizes)


def perturbation(
    weights: list[Tensor], direction: list[Tensor], *, per_tensor: bool
) -> list[Tensor]:
    """gamma |w|/|d| d, the norms per tensor or over all tensors."""
    if per_tensor:
        return [GAMMA * w.norm() / d.norm() * d for w, d in zip(weights, direction, strict=True)]
    w = torch.cat([weight.flatten() for weight in weights])
    d = torch.cat([found.flatten() for found in direction])
    if not d.any():
        return [torch.zeros_like(found) for found in direction]
    return [GAMMA * w.norm() / d.norm() * found for found in direction]
