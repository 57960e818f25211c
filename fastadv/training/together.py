"""The results of several processes on their parts of a batch, averaged in one message.

Processes may take different branches (experts, stochastic depth, LayerDrop), so a gradient may be
present in one and absent in another. Every parameter that learns has its place in the message. An
absent gradient counts as zero, as in DDP with ``find_unused_parameters``, and stays absent if no
process has it. The flags for present gradients and for faults are in the same message.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastadv.engine.model.buffers import copy_into
from fastadv.engine.process import distributed
from fastadv.errors import UserError
from fastadv.training.results import PassResults
from fastadv.training.update import Update


@torch.no_grad()
def bring_together(
    results: PassResults, update: Update, before: Sequence[Tensor], images: int
) -> None:
    """Average ``results`` over the images of all processes, in place: loss, accuracy, gradients of
    the weights and of the adversary's leaves, the regularizer's term, statistics.

    The gradients of this process are those of its last ``images`` images, from one or more calls;
    loss, accuracy and term are those of the last call. ``before`` and the ``faults_found`` of
    ``results`` (0-dim bool) become true if they are true in any process. Only a process without one
    of the gradients reads if another has it, which waits for the device.
    """
    leaves = [] if update.plan.learned is None else update.plan.learned.leaves()
    slots: list[tuple[list[Tensor | None], int, Tensor]] = [
        (results.gradients.weights, place, like)
        for place, like in enumerate(update.parameters.learning())
    ]
    slots += [(results.gradients.leaves, place, like) for place, like in enumerate(leaves)]
    gradients = [
        torch.zeros_like(like) if own[place] is None else own[place] for own, place, like in slots
    ]
    absent = [own[place] is None for own, place, _ in slots]
    flags = [*before, *results.faults_found.values()]
    device = results.loss.device
    present = torch.ones(len(absent), device=device)
    if any(absent):
        present.copy_(torch.tensor(absent).logical_not())
    bad = torch.stack(flags).float()
    # A process whose labels are no classes has no accuracy; all messages have the same length.
    accuracy = torch.zeros((), device=device) if results.accuracy is None else results.accuracy
    # Loss, accuracy and term are of fewer images than the gradients, and weigh less.
    clean = results.clean_accuracy
    clean = torch.zeros((), device=device) if clean is None else clean
    metrics = [results.loss, accuracy, clean, *([] if results.term is None else [results.term])]
    part = len(results.batch.x) / images
    share = torch.full_like(results.loss, part)
    torch._foreach_mul_(metrics, part)
    message = [*metrics, share, *gradients, *results.statistics, present, bad]
    distributed.average([each for each in message if each is not None], images, update.room)
    for metric in metrics:
        metric /= share
    copy_into(flags, list((bad > 0).unbind()))
    if not any(absent):
        return
    somewhere = (present > 0).tolist()
    for (own, place, _), gradient, known in zip(slots, gradients, somewhere, strict=True):
        if own[place] is None and known:
            own[place] = gradient


class Agreement:
    """Checks that all processes train the same model by the same method: at the first update, and
    when the model of this process has changed."""

    def __init__(self, update: Update) -> None:
        self._update = update
        self._seen: Any = None
        self._room = 0

    def keep(self, batch_size: int) -> None:
        """Raise ``UserError`` in every process if models or methods differ. Also agree on the most
        rows of per-sample state that a process sends: the largest ``batch_size``."""
        update = self._update
        remembers = update.plan.keeps_sample_state
        version = update.net.structure.version
        seen = version, tuple(p.requires_grad for p in update.parameters.named.values())
        if seen == self._seen and (batch_size <= self._room or not remembers):
            return
        own = {"method": dict(update.plan.slots), "room": batch_size, "model": self._model()}
        timeout = distributed.GROUP_TIMEOUT if self._seen is None else distributed.AGREEMENT_TIMEOUT
        told = [json.loads(each) for each in distributed.told_by_all(json.dumps(own), timeout)]
        for process, other in enumerate(told[1:], start=1):
            _require_alike(told[0], other, process)
        self._seen, self._room = seen, max(each["room"] for each in told)
        update.room = self._room
        # The first message creates the device's communicator, which a capture may not do.
        distributed.add_up(torch.zeros(1, device=update.net.device))

    def _model(self) -> dict[str, str]:
        update = self._update
        learning = update.parameters.learning_named()
        words = {
            name: _words(parameter) + ("" if name in learning else ", frozen")
            for name, parameter in update.parameters.named.items()
        }
        buffers = update.net.model.named_buffers()
        return words | {name: _words(buffer) for name, buffer in buffers}


def _words(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"


def _require_alike(first: dict[str, Any], other: dict[str, Any], process: int) -> None:
    if first["method"] != other["method"]:
        raise UserError(
            f"Process 0 trains {first['method']} and process {process} {other['method']}: all "
            "processes train by one method."
        )
    names = list(dict.fromkeys([*first["model"], *other["model"]]))
    for name in names:
        here, there = (each["model"].get(name, "absent") for each in (first, other))
        if here != there:
            raise UserError(
                f"{name} is {here} in process 0 and {there} in process {process}: build and freeze "
                "the same model in all processes."
            )
    if list(first["model"]) != list(other["model"]):
        raise UserError(
            f"The parameters of process {process} are in another order than those of process 0: "
            "build the same model in all processes."
        )
