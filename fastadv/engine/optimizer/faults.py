"""Bad updates: a sticky flag on the device, and updates that it masks.

Nothing waits for the flag. It holds the number and the kind of the first bad update. From then on
no update is applied, and the weights stay the last good ones.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from enum import IntEnum

import torch
from torch import Tensor

from fastadv.engine.model.buffers import copy_into
from fastadv.engine.packing import FlatViews, packed
from fastadv.errors import TrainingError


class Fault(IntEnum):
    """The kinds of bad updates. If one update has several, the first in this order is reported."""

    IMAGES = 0
    LABELS = 1
    ROWS = 2
    RADII = 3
    ATTACK = 4
    DIRECTION = 5
    INPUT_GRADIENT = 6
    LOSS = 7
    GRADIENT = 8
    STATISTICS = 9
    UPDATE = 10


STOPPED = "nothing was updated from there on and the weights are the last good ones"
LOWER = "Lower the learning rate, or use bf16 or float32 instead of fp16."
SENTENCES: Mapping[Fault, str] = {
    Fault.IMAGES: "Images were outside of their range or not finite at step {step}; {stopped}. "
    "Scale them to [0,1], and put normalisation inside the model.",
    Fault.LABELS: "Labels were outside of the model's classes, or soft labels did not sum to 1, at "
    "step {step}; {stopped}. Leave such samples out of the batch: no label is ignored.",
    Fault.ROWS: "index named rows outside of num_samples= at step {step}; {stopped}. Pass the size "
    "of the whole training set, from whose rows index counts.",
    Fault.RADII: "eps= or alpha= of an image was negative, not finite or above the range of a "
    "pixel at step {step}; {stopped}. Divide radii and steps in 255ths by 255.",
    Fault.ATTACK: "The gradient of the attack was not finite at step {step}; {stopped}. Lower the "
    "learning rate, or look at the network's outputs in the attack (running statistics that "
    "overflow in eval mode, an attack in fp16).",
    Fault.DIRECTION: "The gradient that perturbs the weights was not finite at step {step}; "
    "{stopped}. " + LOWER,
    Fault.INPUT_GRADIENT: "The loss had a gradient at the images or at learned step sizes that "
    "was not finite at step {step}; {stopped}. Look for operations without a slope (a root or a "
    "norm at 0) before the first layer with weights.",
    Fault.LOSS: "The loss or a gradient stopped being finite at step {step}; {stopped}. " + LOWER,
    Fault.GRADIENT: "The loss or a gradient stopped being finite at step {step}; {stopped}. "
    + LOWER,
    Fault.STATISTICS: "A buffer of the model (BatchNorm's running statistics) stopped being finite "
    "at step {step}; {stopped}. Its activations overflow: lower the learning rate.",
    Fault.UPDATE: "The optimizer's update overflowed at step {step}; {stopped}. Lower the learning "
    "rate, momentum or weight decay.",
}


class Faults:
    """``bad_step`` is the number of the first bad update, -1 while there is none, and ``kind`` its
    ``Fault``; both 0-dim int64 on ``device``."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.bad_step = torch.full((), -1, dtype=torch.int64, device=device)
        self.kind = torch.zeros((), dtype=torch.int64, device=device)
        self._fine = torch.zeros((), dtype=torch.bool, device=device)
        # Faults found before an update begins; filled in place, so that a CUDA graph can read them.
        self.before = {kind: torch.zeros_like(self._fine) for kind in list(Fault)[:4]}

    @torch.no_grad()
    def record(self, faults_found: Mapping[Fault, Tensor], update: Tensor) -> Tensor:
        """Record the update with the number ``update`` (0-dim int64) as bad if any of
        ``faults_found`` (0-dim bool) is true. Returns true (0-dim bool) if the update is to be
        applied."""
        known = {**self.before, **faults_found}
        if self.device.type == "cpu" and not any(known.values()):
            return self.none_so_far()
        bad = torch.stack([known.get(kind, self._fine) for kind in Fault])
        first_bad = bad.any() & (self.bad_step < 0)
        self.kind.copy_(torch.where(first_bad, bad.to(torch.uint8).argmax(), self.kind))
        self.bad_step.copy_(torch.where(first_bad, update, self.bad_step))
        return self.bad_step < 0

    def by_kind(self) -> dict[Fault, Tensor]:
        """Fault -> 0-dim bool, true for the one that was recorded, if any."""
        return {kind: (self.bad_step >= 0) & (self.kind == kind) for kind in Fault}

    def none_so_far(self) -> Tensor:
        """True (0-dim bool on the device) if no update was bad so far."""
        return self.bad_step < 0

    def healthy(self) -> bool:
        """True if no update was bad so far; waits for the device."""
        return int(self.bad_step) < 0

    def check(self) -> None:
        """Raise ``TrainingError``, which names the first bad update, if there was one; waits for
        the device."""
        step = int(self.bad_step)
        if step >= 0:
            sentence = SENTENCES[Fault(int(self.kind))]
            raise TrainingError(sentence.format(step=step, stopped=STOPPED))


def none_of(faults_found: Mapping[Fault, Tensor]) -> Tensor:
    """True (0-dim bool) if none of ``faults_found`` (0-dim bool, at least one) holds."""
    bad = list(faults_found.values())
    if bad[0].device.type == "cpu":
        return ~next((each for each in bad if each), bad[0])
    return ~torch.stack(bad).any()


@torch.no_grad()
def all_finite(tensors: Sequence[Tensor]) -> Tensor:
    """True (0-dim bool) if every value is finite. It checks sums: a sum is not finite if a value is
    not, and it costs less than a check of each value."""
    floating = packed([tensor for tensor in tensors if tensor.is_floating_point()])
    if not floating:
        return torch.ones((), dtype=torch.bool, device=tensors[0].device if tensors else None)
    return _finite_sums(floating)


def _finite_sums(floating: Sequence[Tensor]) -> Tensor:
    if len(floating) == 1:
        return _sum(floating[0]).isfinite()
    return torch.stack([_sum(tensor) for tensor in floating]).isfinite().all()


def _sum(tensor: Tensor) -> Tensor:
    """The sum as float32, computed in float32 or wider."""
    if tensor.dtype is torch.float32:
        return tensor.sum()
    wide = torch.promote_types(tensor.dtype, torch.float32)
    return tensor.sum(dtype=wide).float()


@torch.no_grad()
def apply_where(
    ok: Tensor, update: Callable[[], object], optimizer: torch.optim.Optimizer, known: FlatViews
) -> Tensor:
    """Call ``update`` so that weights and optimizer state change only if ``ok`` and only if all of
    them stay finite; returns true (0-dim bool) if they do.

    On a CPU the flag is read; the caller, which holds copies, restores values that overflowed. On a
    GPU the tensors are copied and restored by a select, since reading the flag would stall the
    device; a fused optimizer also masks itself. The optimizer's state must already exist: a masked
    first step would initialise it from an invalid update. ``known`` are the views of earlier
    updates, which are reused.
    """
    if ok.device.type == "cpu":
        if not ok:
            return torch.ones_like(ok)
        update()
        known.follow([tensor for tensor in telling(optimizer) if tensor.is_floating_point()])
        return _finite_sums(known.packed()) if known.views else torch.ones_like(ok)
    touched = _tensors(optimizer)
    before = [torch.empty_like(tensor) for tensor in touched]
    copy_into(before, touched)
    if getattr(optimizer, "_step_supports_amp_scaling", False):
        optimizer.found_inf = (~ok).float()  # type: ignore[attr-defined]
        try:
            update()
        finally:
            del optimizer.found_inf  # type: ignore[attr-defined]
    else:
        update()
    finite = all_finite(telling(optimizer))
    select_into(touched, ok & finite, before)
    return finite | ~ok


@torch.no_grad()
def select_into(tensors: Sequence[Tensor], ok: Tensor, otherwise: Sequence[Tensor]) -> None:
    """Keep ``tensors`` if ``ok`` (0-dim bool) is true, otherwise copy ``otherwise`` into them."""
    for tensor, old in zip(tensors, otherwise, strict=True):
        torch.where(ok, tensor, old, out=tensor)


def counts_on_the_host(optimizer: torch.optim.Optimizer) -> bool:
    """True if the optimizer keeps state on the host, where no flag on the device can mask it.

    Adam counts its steps there unless it is fused or capturable.
    """
    return any(tensor.device.type == "cpu" for tensor in _state(optimizer))


def _moving(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    """The weights that a step changes."""
    weights = [weight for group in optimizer.param_groups for weight in group["params"]]
    return [weight for weight in weights if weight.grad is not None]


def _tensors(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    """The tensors that a step may change on the device."""
    moving = [weight.detach() for weight in _moving(optimizer)]
    device = moving[0].device if moving else None
    return moving + [tensor for tensor in _state(optimizer) if tensor.device == device]


def telling(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    """The tensors that show if a step overflowed. SGD adds its state to the weights, so for SGD the
    weights are enough."""
    return _moving(optimizer) if type(optimizer) is torch.optim.SGD else _tensors(optimizer)


def _state(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    states = optimizer.state.values()
    return [value for state in states for value in state.values() if isinstance(value, Tensor)]
