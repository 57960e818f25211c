"""Before a replay the model's modules are walked again only where code of the user has run."""

from __future__ import annotations

import copy
from typing import Any

import torch
from op_recorder import graphed
from tiny import tiny_batch, tiny_model, tiny_step
from torch import nn

from fastadv.engine.model.structure import Structure


def test_a_change_is_seen_once_others_may_have_run() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))
    structure = Structure(model)
    with structure.trusted():
        known = structure.registries
        model[1] = nn.BatchNorm2d(4)
        assert structure.registries is known
        structure.distrust()
        assert structure.registries is not known
        assert model[1].weight is structure.registries.parameters()[-2]
    known = structure.registries
    vars(model[0])["_parameters"] = dict(vars(model[0])["_parameters"])
    assert structure.registries is not known  # an equal dictionary that is another object


def test_a_module_replaced_right_before_an_update_is_not_replayed() -> None:
    """By ``before_update``, which runs after the look at the model's structure."""
    model: Any = tiny_model()
    x, y, index, _ = tiny_batch()
    act: list[Any] = []
    step = graphed(tiny_step(model, "pgd", before_update=lambda _: act and act.pop()()))
    for _ in range(3):
        step(x, y, index)
    passes: Any = step.internals.passes
    recorded = passes.recorded
    name, layer = next((n, m) for n, m in model.named_children() if isinstance(m, nn.Conv2d))

    def replace() -> None:
        other = copy.copy(layer)  # shares its parameters
        other._modules = {}
        setattr(model, name, other.train(not layer.training))

    act.append(replace)
    step(x, y, index)
    assert passes.recorded == recorded + 1


def test_a_batch_lies_in_the_inputs_of_the_recording() -> None:
    step = graphed(tiny_step(tiny_model(), "pgd"))
    x, y, index, _ = tiny_batch()
    step(x, y, index)
    step(x, y, index)
    passes: Any = step.internals.passes
    static = passes._current.static
    homes = passes.homes(x, y)
    assert homes.x is static.x
    assert homes.rows is static.index
    assert passes.homes(x[:-1], y[:-1]).x is None
    assert passes.homes(x.float(), y).x is None
    before = x.clone()
    step(x, y, index)
    assert torch.equal(x, before)  # the caller's images are read only
