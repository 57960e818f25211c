"""Accuracy of a model under attacks, as the papers' tables report it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from fastadv.declared import coerce, parse_number
from fastadv.engine.model.network import Network
from fastadv.engine.process import distributed
from fastadv.errors import NotFiniteError, UserError, warn
from fastadv.evaluation.attacks import ATTACKS, inputs
from fastadv.evaluation.attacks.autoattack import require_package
from fastadv.evaluation.attacks.names import OPTIONS, AttackSpec, parse_attack
from fastadv.evaluation.attacks.problem import Problem
from fastadv.evaluation.attacks.watch import NO_ATTACK, Watch
from fastadv.evaluation.intervals import Scores
from fastadv.ranges import outside
from fastadv.threat import Threat, usual_threat

# Below this share of the images nothing is said.
MASKED_SHARE = 0.01
MASKS_SEEN_IN = 16  # images


def evaluate(
    model: nn.Module,
    batches: Iterable[tuple[Tensor, Tensor]],
    attacks: Sequence[str] = ("clean", "pgd-20"),
    *,
    eps: float | str | None = None,
    norm: str = "linf",
    alpha: float | str | None = None,
    seed: int = 0,
    amp: bool | str = False,
    device: torch.device | str | None = None,
    progress: Callable[[int], None] | None = None,
    shared: bool = False,
) -> Scores:
    """Accuracy in [0,1] under each of ``attacks``, by name, from one pass over ``batches``: a
    dictionary with ``n``, the number of images, and ``interval(name)``, the 95 % interval.

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

    Raises ``UserError`` for unknown attacks, no images, images outside [0,1], labels out of range,
    and outputs or gradients that are not finite. Warns, in a sentence with the share of images,
    where the gradient was exactly zero or the softmax so saturated that its loss is exactly zero,
    where the outputs look like probabilities, and where they change from call to call: the
    accuracy flatters then.
    """
    told = None if progress is None else (lambda tally: progress(tally.images))
    options: dict[str, Any] = {"eps": eps, "norm": norm, "alpha": alpha, "seed": seed}
    found = count(
        model, batches, attacks, **options, amp=amp, device=device, shared=shared, after=told
    )
    for sentence in found.remarks():
        warn(sentence)
    return found.scores()


def count(
    model: nn.Module,
    batches: Iterable[tuple[Tensor, Tensor]],
    attacks: Sequence[str],
    *,
    eps: float | str | None,
    norm: str,
    alpha: float | str | None,
    seed: int,
    amp: bool | str = False,
    device: torch.device | str | None = None,
    shared: bool = False,
    done: Counts | None = None,
    after: Callable[[Tally], None] | None = None,
) -> Counts:
    """What ``evaluate`` counts, with the pass to be gone on with later.

    ``after(tally)`` is called after each batch; ``tally.counted()`` is then what ``done`` takes in
    another call with the same images in the same batches: those counted already are only read.
    Of several processes the first one brings the counts of ``done``.
    """
    specs = specs_of(attacks, None if alpha is None else parse_number(alpha, "alpha"))
    threat = usual_threat(norm, eps)
    for spec in specs.values():
        threat.require_step(spec.alpha)
    seed = coerce("seed", seed, int)
    where = inputs.model_device(model, torch.device("cpu")) if device is None else device
    net = inputs.attacked_network(model, torch.device(where), amp)
    with inputs.attackable(net):
        tally = Tally(net, threat, specs, seed)
        processes, own = (distributed.world_size(), distributed.rank()) if shared else (1, 0)
        if done is not None:
            tally.take(done, counts=own == 0)
        seen = 0
        for number, batch in enumerate(batches):
            x, y = _pair(batch)
            seen += len(x)
            if seen <= tally.images:
                continue  # counted before
            if seen - len(x) != tally.images:
                raise ValueError("the counts to go on with are of other batches")
            if number % processes == own:
                tally.add(x, y)
            tally.images = seen
            tally.settle()
            if after is not None:
                after(tally)
        return tally.counted(shared=shared)


@dataclass(frozen=True)
class Counts:
    """What a pass has counted of the first ``images``, as plain numbers.

    ``right``, ``still`` and ``saturated`` by attack: images classified right, those whose gradient
    was exactly zero where the attack began, those whose loss was exactly zero after it.
    ``masks``: whether the first batch's outputs were probabilities, whether they changed.
    """

    attacks: list[str]
    images: int
    right: list[int]
    still: list[int]
    saturated: list[int]
    masks: list[bool]

    def scores(self) -> Scores:
        """Accuracy in [0,1] by attack."""
        if self.images == 0:
            raise UserError("There are no images to evaluate: the batches are empty.")
        shares = (torch.tensor(self.right) / self.images).tolist()
        return Scores(dict(zip(self.attacks, shares, strict=True)), self.images)

    def remarks(self) -> Iterator[str]:
        """Sentences about what makes the accuracy look better than it is."""
        n = self.images
        for name, still, saturated in zip(self.attacks, self.still, self.saturated, strict=True):
            if still >= max(1.0, MASKED_SHARE * n):
                yield (
                    f"{name}: the gradient was exactly zero for {still} of {n} images "
                    f"({100 * still / n:.0f} %) that were classified right; the network hides its "
                    "gradient (rounding, saturation), and its accuracy there means nothing: judge "
                    "with cw, cw-margin or autoattack."
                )
            elif saturated >= max(1.0, MASKED_SHARE * n):
                yield (
                    f"{name}: after the attack the loss was exactly zero for {saturated} of {n} "
                    f"images ({100 * saturated / n:.0f} %); the softmax is saturated and hides its "
                    "slope: judge with cw, cw-margin or autoattack."
                )
        probabilities, changes = self.masks or (False, False)
        if probabilities:
            yield (
                "The model returns probabilities, not logits: its gradient vanishes where it is "
                "sure, and the accuracy under attack is too high; leave the softmax or sigmoid out."
            )
        if changes:
            yield (
                "The model's outputs change from call to call in eval mode: an attack climbs on "
                "noise, and the accuracy is too high; judge with its noise switched off."
            )


def specs_of(names: Sequence[str], alpha: float | None) -> dict[str, AttackSpec]:
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


class Tally:
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
        # By attack: images classified right, those whose gradient was exactly zero where the attack
        # began, those whose loss was exactly zero after it.
        self.counts = torch.zeros(3, len(specs), dtype=torch.int64, device=net.device)
        self.right, self.still, self.saturated = self.counts
        # Images outside the box, labels out of range, logits or gradients that are not finite.
        self.trouble = torch.zeros(4, dtype=torch.bool, device=net.device)
        self.masks: list[Tensor] = []  # of the first batch: probabilities, outputs that change
        self.settle()
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
        if not self.masks:
            self._look_for_masks(problem, clean)
        if self.net.syncs_are_free or not self.looked:
            self._raise_trouble()
            self.looked = True
        # An index out of range would end a CUDA process; the mistake is reported at the end.
        problem = replace(problem, y=y.clamp(0, self.classes - 1))
        for position, spec in enumerate(self.specs.values()):
            if spec.kind == "clean":
                logits = clean
            else:
                watch = Watch(device)
                logits = self._logits_under(spec, replace(problem, watch=watch))
                self.trouble[3] |= watch.bad
                self.still[position] += watch.still
            right = logits.argmax(1) == problem.y
            self.right[position] += right.sum()
            if "steps" in OPTIONS[spec.kind]:
                loss = cross_entropy(logits, problem.y, reduction="none")
                self.saturated[position] += (right & (loss == 0)).sum()
        if self.net.syncs_are_free:
            self._raise_trouble()

    def _logits_under(self, spec: AttackSpec, problem: Problem) -> Tensor:
        x_adv = ATTACKS[spec.kind](problem, spec)
        with torch.no_grad():
            logits = problem.logits(x_adv)
        made = x_adv.isfinite().all()
        self.trouble[2] |= made & ~logits.isfinite().all()
        self.trouble[3] |= ~made
        return logits

    @torch.no_grad()
    def _look_for_masks(self, problem: Problem, clean: Tensor) -> None:
        few = slice(MASKS_SEEN_IN)
        again = problem.logits(problem.x[few])
        apart = (again - clean[few]).abs().amax()
        changes = apart > 1e-3 * clean[few].abs().amax().clamp(min=1e-30)
        sums, largest = clean[few].sum(1), clean[few].amax(1)
        # Those of a softmax add up to 1; of a sigmoid each is sure for itself.
        softmax, sigmoid = (sums - 1).abs().amax() < 1e-3, largest.mean() > 0.5
        probabilities = (clean[few].amin() >= 0) & (largest.amax() <= 1) & (softmax | sigmoid)
        self.masks = [probabilities, changes]

    def _note_trouble(self, x: Tensor, y: Tensor, logits: Tensor) -> None:
        out_of_range = ((y < 0) | (y >= self.classes)).any()
        not_finite = ~logits.isfinite().all()
        self.trouble[:3] |= torch.stack([outside(x), out_of_range, not_finite])

    def _raise_trouble(self) -> None:
        """Raise what was noted; waits for the device."""
        outside, out_of_range, not_finite, no_attack = self.trouble.tolist()
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
        if no_attack:
            raise NotFiniteError(NO_ATTACK)

    def settle(self) -> None:
        """Note the counts of whole batches; what interrupts the next one leaves them."""
        self._whole = self.images, self.counts.clone()

    def take(self, done: Counts, *, counts: bool) -> None:
        """Go on after ``done``; ``counts``: whether they are this process's to bring."""
        self.images = done.images
        if counts:
            self.counts += torch.tensor(
                [done.right, done.still, done.saturated], device=self.counts.device
            )
        self.masks = [torch.tensor(mask, device=self.net.device) for mask in done.masks]
        self.settle()

    def counted(self, *, shared: bool = False) -> Counts:
        """The counts of whole batches, of all processes where ``shared``. Waits for the device.

        Raises ``UserError`` for images, labels and a network that cannot be judged.
        """
        self._raise_trouble()
        images, counts = self._whole
        if shared:
            counts = counts.clone()
            distributed.add_up(counts)
        masks = [bool(mask) for mask in self.masks]
        right, still, saturated = counts.tolist()
        return Counts(list(self.specs), images, right, still, saturated, masks)


def _memory_format(model: nn.Module) -> torch.memory_format:
    """channels_last where the model's convolutions are, so that no pass converts its input."""
    kernels = [parameter for parameter in model.parameters() if parameter.dim() == 4]
    # A 1x1 or one-channel kernel is in both layouts and says nothing.
    telling = [w for w in kernels if math.prod(w.shape[2:]) > 1 and w.shape[1] > 1]
    if telling and all(w.is_contiguous(memory_format=torch.channels_last) for w in telling):
        return torch.channels_last
    return torch.contiguous_format
