"""A network that cannot be one graph: refused if compiling was requested, otherwise run eagerly."""

from functools import partial

import pytest
import torch
from tiny import TinyNet, assert_same, tiny_batch, tiny_model, tiny_step

from fastadv.engine.compiled import Runner
from fastadv.errors import UserError


class Looking(TinyNet):
    """A forward that breaks the graph: Python reads a value."""

    def forward(self, x):
        if float(x.detach().sum()) > 1e9:
            x = x / 2
        return super().forward(x)


def looking():
    model = Looking().double()
    model.load_state_dict(tiny_model().state_dict())
    return model


def test_compiled_mode_reports_why_it_is_impossible():
    x, y, index, start = tiny_batch()
    step = tiny_step(looking(), "pgd", steps=2, mode="compiled")
    with pytest.raises(UserError, match=r"cannot be compiled as one graph.*mode='eager'"):
        step(x, y, index, start=start)


def test_in_auto_mode_it_runs_uncompiled():
    x, y, index, start = tiny_batch()
    model, other = looking(), tiny_model()
    step = tiny_step(model, "pgd", steps=2)
    step.internals.net.runner = Runner(True, "aot_eager", strict=False)
    with pytest.warns(UserWarning, match="it runs as written") as told:
        step(x, y, index, start=start)
    assert told[0].filename == __file__  # the caller's line, through decorators and our frames
    tiny_step(other, "pgd", steps=2)(x, y, index, start=start)
    assert_same(model, other, 1e-12)
    assert not step.internals.net.runner.compiles


def test_a_plain_function_is_a_region() -> None:
    def twice(x: torch.Tensor, *, factor: float = 2.0) -> torch.Tensor:
        return factor * x

    x = torch.arange(3.0)
    for region in (twice, partial(twice, factor=3.0), torch.nn.Softplus()):
        assert torch.equal(Runner(True, "aot_eager")(region, x), region(x))


def test_a_tensor_on_another_device_is_named():
    x, y, index, _ = tiny_batch()
    for place, name in enumerate(("x", "y", "index")):
        given = [x, y, index]
        given[place] = torch.empty(given[place].shape, dtype=given[place].dtype, device="meta")
        with pytest.raises(UserError, match=f"^{name} is on meta and the model on cpu"):
            tiny_step(tiny_model(), "pgd")(*given)
