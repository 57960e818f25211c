"""Accuracy of a model under attacks, as the papers' tables report it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from fastadv.attacks import ATTACKS, inputs
from fastadv.attacks.autoattack import require_package
from fastadv.attacks.names import OPTIONS, AttackSpec, parse_attack
from fastadv.attacks.problem import Problem
from fastadv.declared import coerce, parse_number
from fastadv.engine import distributed
from fastadv.engine.network import Network
from fastadv.errors import NotFiniteError, UserError
from fastadv.threat import Threat


def evaluate(
    model: nn.Module,
    batches: Iterable[tuple[Tensor, Tensor]],
    attacks: Sequence[str] = ("clean", "pgd-20"),
    *,
    eps: float | str = 8 / 255,
    norm: str = "linf",
    alpha: float | str | None = None,
    seed: int = 0,
    amp: bool | str = False,
    device: torch.device | str | None = None,
    progress: Callable[[int], None] | None = None,
    shared: bool = False,
) -> dict[str, float]:
    """Accuracy in [0,1] under each of ``attacks``, by name, from one pass over ``batches``.

    ``batches`` yields (x, y): ``x`` (B,C,H,W) float in [0,1], ``y`` (B,) classes. For the names
    and for ``eps`` and ``norm`` see ``fastadv.attack``; ``alpha`` (pixels) is the step of the
    attacks with several steps. ``amp`` computes in "bf16" (True) or "fp16". ``device`` is the
    model's when None. ``progress(images)`` is called after each batch with the number of images
    judged so far. ``shared``: the processes of the group, which must all call this with the same
    images, judge the batches in turn and all get the whole accuracy.

    Robust accuracy is the share of all images whose x_adv is classified right. Images that are
    misclassified without an attack are attacked too, as in the papers: counting them as wrong
    unseen would give a lower number where an attack happens to move one back. Only what cannot
    change a count is left out: a restart on an image that an earlier one fooled.

    The model runs in eval mode and is left as it was found. Image number i of the pass draws the
    same noise whatever the batch size (AutoAttack's own draws excepted). Nothing waits for the
    device between the first batch and the last, AutoAttack excepted.

    Raises ``UserError`` for unknown attacks, no images, images outside [0,1], labels out of range
    and logits that are not finite.
    """
    specs = _specs(attacks, None if alpha is None else parse_number(alpha, "alpha"))
    threat = Threat(norm, parse_number(eps, "eps"))
    seed = coerce("seed", seed, int)
    where = inputs.model_device(model, torch.device("cpu")) if device is None else device
    net = inputs.attacked_network(model, torch.device(where), amp)
    with inputs.attackable(net):
        tally = _Tally(net, threat, specs, seed)
        processes = distributed.world_size() if shared else 1
        for number, batch in enumerate(batches):
            x, y = _pair(batch)
            if number % processes == (distributed.rank() if shared else 0):
                tally.add(x, y)
            else:
                tally.images += len(x)
            if progress is not None:
                progress(tally.images)
        if shared:
            distributed.add_up(tally.right)
        return tally.scores()


def _specs(names: Sequence[str], alpha: float | None) -> dict[str, AttackSpec]:
    """The attacks by the name they were asked for, ``alpha`` set where there are several steps."""
    names = names.split(",") if isinstance(names, str) else names
    specs = {name.strip(): parse_attack(name) for name in names}
    if not specs:
        raise UserError("Name at least one attack, such as 'clean' or 'pgd-20'.")
    if any(spec.kind == "autoattack" for spec in specs.values()):
        require_package()
    if alpha is None:
        return specs
    return {
        name: replace(spec, alpha=alpha) if "steps" in OPTIONS[spec.kind] else spec
        for name, spec in specs.items()
    }


def _pair(batch: object) -> tuple[Tensor, Tensor]:
    if not isinstance(batch, (tuple, list)) or len(batch) != 2:
        raise UserError("Batches to evaluate must be pairs (images, labels).")
    x, y = batch
    inputs.check_batch(x, y)
    return x, y


class _Tally:
    """Counts of right answers, kept on the device until the end."""

    def __init__(
        self, net: Network, threat: Threat, specs: dict[str, AttackSpec], seed: int
    ) -> None:
        self.net = net
        self.threat = threat
        self.specs = specs
        self.seed = seed
        self.images = 0
        self.looked = False
        self.classes = 0
        self.right = torch.zeros(len(specs), dtype=torch.int64, device=net.device)
        # Images outside the box, labels out of range, logits that are not finite.
        self.trouble = torch.zeros(3, dtype=torch.bool, device=net.device)
        self.format = _memory_format(net.model)

    def add(self, x: Tensor, y: Tensor) -> None:
        """Attack and judge one batch."""
        if len(x) == 0:
            return
        device = self.net.device
        x = inputs.plain(x).to(device, non_blocking=True)
        if x.dim() == 4:
            x = x.contiguous(memory_format=self.format)
        y = inputs.plain(y).to(device, torch.int64, non_blocking=True)
        index = torch.arange(self.images, self.images + len(x), device=device)
        problem = Problem(self.net, self.threat, x, y, index, self.seed)
        with torch.no_grad():
            clean = problem.logits(x)
        self.classes = clean.shape[1]
        self._note_trouble(x, y, clean)
        if self.net.waits_are_free or not self.looked:
            self._raise_trouble()
            self.looked = True
        # An index out of range would end a CUDA process; the mistake is reported at the end.
        problem = replace(problem, y=y.clamp(0, self.classes - 1))
        for position, spec in enumerate(self.specs.values()):
            logits = clean if spec.kind == "clean" else self._logits_under(spec, problem)
            self.right[position] += (logits.argmax(1) == problem.y).sum()
        self.images += len(x)

    def _logits_under(self, spec: AttackSpec, problem: Problem) -> Tensor:
        x_adv = ATTACKS[spec.kind](problem, spec)
        with torch.no_grad():
            logits = problem.logits(x_adv)
        self.trouble[2] |= ~logits.isfinite().all()
        return logits

    def _note_trouble(self, x: Tensor, y: Tensor, logits: Tensor) -> None:
        out_of_range = ((y < 0) | (y >= self.classes)).any()
        not_finite = ~logits.isfinite().all()
        self.trouble |= torch.stack([inputs.outside_box(x), out_of_range, not_finite])

    def _raise_trouble(self) -> None:
        """Raise what was noted; waits for the device."""
        outside, out_of_range, not_finite = self.trouble.tolist()
        if outside:
            raise UserError(inputs.BOX_SENTENCE)
        if out_of_range:
            raise UserError(
                f"Labels are out of range: the model has {self.classes} classes, so labels run "
                f"from 0 to {self.classes - 1}."
            )
        if not_finite:
            raise NotFiniteError(
                "The model's outputs are not finite, so its accuracy means nothing; judge an "
                "earlier checkpoint, or judge without amp."
            )

    def scores(self) -> dict[str, float]:
        """Accuracy in [0,1] by attack."""
        if self.images == 0:
            raise UserError("There are no images to evaluate: the batches are empty.")
        self._raise_trouble()
        return dict(zip(self.specs, (self.right / self.images).tolist(), strict=True))


def _memory_format(model: nn.Module) -> torch.memory_format:
    """channels_last where the model's convolutions are, so that no pass converts its input."""
    kernels = [parameter for parameter in model.parameters() if parameter.dim() == 4]
    # A 1x1 or one-channel kernel is in both layouts and says nothing.
    telling = [w for w in kernels if math.prod(w.shape[2:]) > 1 and w.shape[1] > 1]
    if telling and all(w.is_contiguous(memory_format=torch.channels_last) for w in telling):
        return torch.channels_last
    return torch.contiguous_format
