"""Many small tensors saved and restored with few launches."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from fastadv.engine.model.buffers import Layout, Snapshot, kept


def tensors():
    """Typical buffers of modules: statistics, counters, masks, unusual layouts, empty ones."""
    torch.manual_seed(0)
    statistics = [torch.randn(size) for size in (3, 1, 8)]
    counters = [torch.tensor(7), torch.tensor(9)]
    image = torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last)
    odd = [image, torch.randn(6, 4).t(), torch.zeros(0), torch.tensor([True, False])]
    return statistics + counters + odd


def changed(values):
    for value in values:
        value.fill_(1 if value.dtype is torch.bool else 5)
    values[0][0] = float("nan")


@pytest.mark.parametrize("ok", [True, False])
def test_values_are_restored_unless_the_update_is_finite(ok):
    values = tensors()
    changed(after := tensors())
    changed_values = [value.clone() for value in after]
    before = Snapshot(Layout(values))
    changed(values)
    before.put_back_unless(torch.tensor(ok))
    for value, expected in zip(values, changed_values if ok else tensors(), strict=True):
        torch.testing.assert_close(value, expected, rtol=0, atol=0, equal_nan=True)


def test_values_return_after_an_error():
    values = tensors()

    def failing():
        with kept(Layout(values)):
            changed(values)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        failing()
    assert all(torch.equal(a, b) for a, b in zip(values, tensors(), strict=True))


def test_a_model_without_buffers():
    """Not a launch, no flag for statistics, and other tensors keep their changes."""
    value = torch.zeros(3)
    with kept(Layout([])):
        value.fill_(5)
    assert torch.equal(value, torch.full((3,), 5.0))
    with Launches() as seen:
        nothing = Snapshot(Layout([]))
        assert nothing.not_finite() is None
        nothing.put_back()
        nothing.put_back_unless(torch.tensor(False))
    assert seen.count <= 1  # of the flag itself


class Launches(TorchDispatchMode):
    """The number of operators that compute something; views and allocations do not."""

    count = 0

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        self.count += not operator.is_view and "split" not in str(operator)
        return operator(*args, **(kwargs or {}))


def test_the_launches_do_not_grow_with_the_buffers():
    norms = [torch.nn.BatchNorm2d(4) for _ in range(17)]
    values = [buffer for norm in norms for buffer in norm.buffers()]
    with Launches() as seen:
        Snapshot(Layout(values)).put_back_unless(torch.tensor(True))
    assert len(values) == 51
    assert seen.count <= 2 * 4 + 2  # two data types, and the tensor of the flag
