"""Bad updates: a sticky flag on the device, and updates that it masks.

Nothing waits for the flag. It holds the number and the kind of the first bad update. From then on
no update is applied, and the weights stay the last good ones.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from enum import IntEnum

import torch
from torch import Tensor

from fastadv import kernels
from fastadv.engine.model.buffers import copy_into
from fastadv.engine.packing import FlatViews, packed
from fastadv.errors import NotFinite
from fastadv.kernels.reference_guard import shows_fault


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
    def record(
        self,
        signs: Mapping[Fault, Tensor],
        update: Tensor,
        *,
        unrecorded: frozenset[Fault] = frozenset(),
        ok: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """Record the update with the number ``update`` (0-dim int64) as bad if any of ``signs``
        says so: a 0-dim bool that is true, or a 0-dim number that is not finite.

        Returns true (0-dim bool) if the update is to be applied: if ``ok`` (0-dim bool; None: true)
        is true, there is no sign of a fault and there was none so far; and for an optimizer that
        masks itself 0 then and else 1 (0-dim float32; None on a CPU, where the flag is read).
        Faults that are ``unrecorded`` stop this update and no later one; where ``ok`` is false none
        is recorded.
        """
        if self.device.type == "cpu":
            return self._record_on_the_host(signs, update, unrecorded, ok), None
        known = {**self.before, **signs}
        marks = [kind not in unrecorded for kind in Fault]
        found = [known.get(kind) for kind in Fault]
        return kernels.record_fault(self.bad_step, self.kind, update, found, marks, ok)

    def _record_on_the_host(
        self,
        signs: Mapping[Fault, Tensor],
        update: Tensor,
        unrecorded: frozenset[Fault],
        ok: Tensor | None,
    ) -> Tensor:
        found = {kind: shows_fault(sign) for kind, sign in signs.items()}
        bad = {**self.before, **{k: each for k, each in found.items() if k not in unrecorded}}
        if (ok is None or ok) and any(bad.values()) and self.bad_step < 0:
            self.kind.fill_(next(kind for kind in Fault if bad.get(kind)))
            self.bad_step.copy_(update)
        fine = ~next((each for each in found.values() if each), self._fine)
        applied = self.none_so_far() & fine
        return applied if ok is None else applied & ok

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
        """Raise ``NotFinite``, which names the first bad update, if there was one; waits for
        the device."""
        step = int(self.bad_step)
        if step >= 0:
            sentence = SENTENCES[Fault(int(self.kind))]
            raise NotFinite(sentence.format(step=step, stopped=STOPPED))


def not_finite(tensors: Sequence[Tensor]) -> Tensor:
    """True (0-dim bool) if a value is not finite; one launch on a GPU."""
    if not tensors or tensors[0].device.type == "cpu":
        return ~all_finite(tensors)
    floating = [tensor.detach() for tensor in tensors if tensor.is_floating_point()]
    if not floating:
        return torch.zeros((), dtype=torch.bool, device=tensors[0].device)
    return kernels.not_finite(floating)


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
def apply_if(
    ok: Tensor, update: Callable[[], object], optimizer: torch.optim.Optimizer, known: FlatViews
) -> Tensor:
    """On a CPU, where the flag ``ok`` (0-dim bool) is read: call ``update`` if it is true, and
    return true (0-dim bool) if weights and optimizer state stayed finite. The caller, which holds
    copies, restores what overflowed. ``known`` are the views of earlier updates, which are reused.
    """
    if not ok:
        return torch.ones_like(ok)
    update()
    known.follow([tensor for tensor in telling(optimizer) if tensor.is_floating_point()])
    return _finite_sums(known.packed()) if known.views else torch.ones_like(ok)


@torch.no_grad()
def apply_masked(
    ok: Tensor,
    unfit: Tensor,
    update: Callable[[], object],
    optimizer: torch.optim.Optimizer,
    record: Callable[[Tensor], Tensor],
) -> Tensor:
    """On a GPU, where reading a flag would stall the device: call ``update`` so that weights and
    optimizer state change only if ``ok`` (0-dim bool), and only if all of them stay finite; returns
    true (0-dim bool) if they do.

    The tensors are copied before and put back after. ``unfit`` (0-dim float32, 0 if ``ok`` and else
    1) is for a fused optimizer, which also masks itself. The optimizer's state must already exist:
    a masked first step would initialise it from an invalid update. ``record`` is given true (0-dim
    bool) if something overflowed, and returns true if the update counts.
    """
    touched = _tensors(optimizer)
    before = [torch.empty_like(tensor) for tensor in touched]
    copy_into(before, touched)
    if getattr(optimizer, "_step_supports_amp_scaling", False):
        optimizer.found_inf = unfit  # type: ignore[attr-defined]
        try:
            update()
        finally:
            del optimizer.found_inf  # type: ignore[attr-defined]
    else:
        update()
    counts = record(not_finite(telling(optimizer)))
    kernels.put_back_unless(touched, before, counts)
    return counts


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
