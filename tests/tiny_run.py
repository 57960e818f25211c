"""A short run of any recipe in any mode, and the comparison of two runs.

Five updates per epoch, the last on a short batch; four epochs, in which every ramp moves
and every warm-up ends, a rate that falls with every update, evaluation after every epoch, and a
state loaded in the middle.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from every_recipe import EPOCHS, call, step_of
from tiny import EPS, tiny_batch
from tiny_capture import capture
from tiny_staged import staged_model
from torch import Tensor
from torch._dynamo.backends.registry import lookup_backend

import fastadv
from fastadv.training.training_step import Step

SIZES = (6, 6, 6, 6, 4)
UPDATES = EPOCHS * len(SIZES)


class Counting:
    """A backend of ``torch.compile`` that counts the graphs it is given."""

    def __init__(self, backend: str) -> None:
        self.compiler = lookup_backend(backend)
        self.count = 0

    def __call__(self, graph: torch.fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        # A compilation that Dynamo starts over, to make a number a constant, raises here.
        compiled = self.compiler(graph, inputs)
        self.count += 1
        return compiled


@dataclass
class Run:
    """A finished run. By epoch: ``compilations``, and which parts were ``active``."""

    step: Step
    losses: list[Tensor] = field(default_factory=list)
    compilations: list[int] = field(default_factory=list)
    active: list[tuple[bool, ...]] = field(default_factory=list)

    def tensors(self) -> dict[str, Tensor]:
        """Everything the run has changed, and its losses, by name."""
        found = dict(self.step.model.state_dict()) | self.step.state
        for place, state in enumerate(self.step.optimizer.state.values()):
            found |= {f"{name} of parameter {place}": value for name, value in state.items()}
        averaging = self.step.plan.averaging
        average = {} if averaging is None else averaging.averaged()
        found |= {f"average of {name}": value for name, value in average.items()}
        return found | {"losses": torch.stack(self.losses)}


def run(method: str, mode: str = "eager", backend: str = "aot_eager", **options: Any) -> Run:
    """20 updates of ``method`` with ``options``; "captured" is replayed by calling, and so is
    "captured compiled", whose regions are compiled like a long captured run's."""
    counting = Counting(backend)
    given = "compiled" if "compiled" in mode else "eager"
    lengths = {"epoch_length": len(SIZES), "backend": counting}
    step = step_of(method, staged_model(), given, **lengths, **options)
    if "captured" in mode:
        capture(step)
    optimizer = step.optimizer
    rates = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda update: 1 - update / UPDATES)
    done = Run(step)
    for epoch in range(EPOCHS):
        before = counting.count
        for place, size in enumerate(SIZES):
            done.losses.append(call(step, epoch * len(SIZES) + place, size)["loss"])
            rates.step()
        _evaluate(step)
        done.compilations.append(counting.count - before)
        done.active.append(tuple(part.active for part in step.plan.parts.values()))
        if epoch == 1:
            step.load_state_dict(copy.deepcopy(step.state_dict()))
    return done


def _evaluate(step: Step) -> None:
    x, y, _, _ = tiny_batch(5, seed=999)
    with step.evaluation_weights([x]):
        fastadv.evaluate(step.model, [(x, y)], ("clean", "pgd-1"), eps=EPS)


def assert_same_run(first: Run, second: Run, tolerance: float) -> None:
    """Every tensor agrees to ``tolerance`` of its largest element."""
    own, others = first.tensors(), second.tensors()
    assert own.keys() == others.keys()
    for name, tensor in own.items():
        other = others[name]
        assert tensor.shape == other.shape, name
        if not tensor.is_floating_point():
            assert torch.equal(tensor, other), name
            continue
        largest = tensor.abs().max()
        assert torch.isfinite(largest), name
        assert (tensor - other).abs().max() <= tolerance * largest, name
