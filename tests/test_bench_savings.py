"""Each saving can be switched off in a step, and bench/savings.py times both sides."""

import importlib
import json
import sys
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from bench_script import BENCH, script
from torch.utils._python_dispatch import TorchDispatchMode

from fastadv.algorithms.contract import Batch
from fastadv.benchmark.setting import Setting
from fastadv.engine.model import network
from fastadv.engine.model.bn_stand_in import StandIn
from fastadv.training.training_step import Step

savings = script("savings")


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=() if number % 2 == 0 else pytest.mark.slow)
        for number, name in enumerate(savings.SAVINGS)
    ],
)
def test_a_row_has_both_sides(name):
    method, network, take_away = savings.SAVINGS[name]
    row = savings.saving(Setting(network, 4, 8, 8), method, take_away, "fp32", 2)
    assert set(row["ms"]) == {"plain", "saving"}
    assert 0.1 < row["plain_over_saving"]["median"] < 10


class Counted(TorchDispatchMode):
    """Counts in the updates of a step what the savings take away."""

    def __init__(self, step: Step, patched: pytest.MonkeyPatch) -> None:
        super().__init__()
        self.step = step
        self.counts: Counter[str] = Counter()
        self.weights = {parameter.data_ptr() for parameter in step.model.parameters()}
        step.model.register_forward_pre_hook(lambda *_: self.counts.update(["forwards"]))
        self._count_calls(patched, network, "cheap_double_backward")
        self._count_calls(patched, StandIn, "of")

    def _count_calls(self, patched: pytest.MonkeyPatch, owner: Any, name: str) -> None:
        plain = getattr(owner, name)

        def counting(*inputs: Any) -> Any:
            self.counts[name] += 1
            return plain(*inputs)

        patched.setattr(owner, name, counting)

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        if operator is torch.ops.aten._to_copy.default:
            self.counts["casts"] += args[0].data_ptr() in self.weights
        if operator is torch.ops.aten.add_.Tensor:
            self.counts["integers counted"] += not args[0].is_floating_point()
        return operator(*args, **(kwargs or {}))

    def of_an_update(self, batch: Batch, what: str) -> int:
        self.counts.clear()
        with self:
            self.step(batch.x, batch.y, batch.index)
        return self.counts[what]


def lowered(step: Step) -> int:
    """The number of weights that autocast casts: those of convolutions, and two of the last
    layer."""
    kinds = (torch.nn.Conv2d, torch.nn.Linear)
    found = [module for module in step.model.modules() if isinstance(module, kinds)]
    return sum(len(list(module.parameters(recurse=False))) for module in found)


def norms(step: Step) -> int:
    return sum(isinstance(module, torch.nn.BatchNorm2d) for module in step.model.modules())


ATTACK, PASSES = 10, 11  # of PGD-10: input gradients, and these with the outer pass
OTHER_COUNTS = 3  # the update's number, and images whose attack has not moved them

# what takes a saving away -> what it counts, that number with the saving, and without
TAKEN: dict[str, tuple[str, Callable[[Step], int], Callable[[Step], int]]] = {
    "unshared": ("forwards", lambda step: 2, lambda step: 3),
    "uncopied": ("casts", lambda step: 0, lambda step: PASSES * lowered(step)),
    "counted_alone": (
        "integers counted",
        lambda step: OTHER_COUNTS,
        lambda step: OTHER_COUNTS + PASSES * norms(step),
    ),
    "composed": ("cheap_double_backward", lambda step: 1, lambda step: 0),
    "unfolded": (
        "of",  # the stand-ins of folded convolutions
        lambda step: ATTACK * len(step.internals.net.copies.folds),
        lambda step: 0,
    ),
}


@pytest.mark.parametrize("name", savings.SAVINGS)
def test_what_is_taken_away_is_gone(name, monkeypatch):
    monkeypatch.setattr("fastadv.engine.model.precision.cpu_multiplies", lambda dtype: True)
    method, model, take_away = savings.SAVINGS[name]
    what, saved, plain = TAKEN[take_away.__name__]
    dtype = "bf16" if take_away is savings.uncopied else "fp32"
    setting = Setting(model, 4, 8, 8)
    (spec,) = savings.parse_specs(method)
    step = savings.make_step(setting, spec, dtype, "eager")
    batch = setting.batches(1)[0]
    step(batch.x, batch.y, batch.index)
    counted = Counted(step, monkeypatch)
    expected = saved(step)
    assert expected != plain(step)
    assert counted.of_an_update(batch, what) == expected
    take_away(step)
    assert counted.of_an_update(batch, what) == plain(step)


@pytest.mark.slow
def test_the_script_writes_a_row_of_each(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(BENCH))  # its own processes import it by name
    script = importlib.import_module("savings")
    tiny = ["--width", "2", "--batch-size", "4", "--repeats", "1"]
    monkeypatch.setattr(sys, "argv", ["savings.py", *tiny, "--out", str(tmp_path)])
    script.main()
    (file,) = tmp_path.iterdir()
    found = [json.loads(line)["saving"] for line in file.read_text().splitlines()]
    freed = [script.FREED_MEMORY] * len(script.FREED_MEMORY_METHODS)
    assert found == [*script.SAVINGS, *freed]
