"""BatchNorms count their batches as in PyTorch, with one launch per pass."""

import pytest
import torch
from tiny import (
    CLASSES,
    EPS,
    TinyNet,
    assert_same,
    climb,
    descend,
    sgd,
    tiny_batch,
    tiny_model,
    tiny_step,
)
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import fastadv
from fastadv.engine.model.bn_counters import BatchNormCounters

COUNTER = "num_batches_tracked"


class Odd(nn.Module):
    """A norm called once, one called twice, one of another kind, one only in training."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.once, self.twice = nn.BatchNorm2d(4), nn.BatchNorm2d(4)
        self.exact, self.frozen = nn.BatchNorm2d(4, momentum=None), nn.BatchNorm2d(4)
        self.training_only = nn.BatchNorm2d(4)
        self.untracked = nn.BatchNorm2d(4, track_running_stats=False)
        self.never = nn.BatchNorm2d(4)
        self.head = nn.Linear(4, CLASSES)

    def forward(self, x):
        x = self.twice(self.twice(self.once(self.conv(x))))
        x = self.untracked(self.frozen(self.exact(x)))
        if self.training:
            x = self.training_only(x)
        return self.head(x.mean((2, 3)))


def counts(model):
    return {name: int(b) for name, b in model.named_buffers() if name.endswith(COUNTER)}


@pytest.mark.parametrize("mode", ["eager", "compiled"])
def test_every_norm_counts_as_often_as_it_is_called(mode):
    """PGD-3 with a clean training pass: four passes per update in training mode."""
    x, y, index, _ = tiny_batch()
    torch.manual_seed(0)
    model = Odd().to(x.dtype)
    model.frozen.eval()
    if mode == "compiled":
        model.exact.momentum = 0.1  # momentum=None needs the count's value, which no graph can hold
    options = {"steps": 3, "attack_bn": "train", "mode": mode}
    step = tiny_step(model, "pgd", optimizer=torch.optim.SGD(model.parameters(), 0.1), **options)
    for _ in range(2):
        step(x, y, index)
    expected = {"once": 8, "twice": 16, "exact": 8, "frozen": 0, "training_only": 8, "never": 0}
    assert counts(model) == {f"{name}.{COUNTER}": count for name, count in expected.items()}


def test_one_launch_counts_for_all_norms_of_a_network():
    class Additions(TorchDispatchMode):
        """Operators that add to a counter."""

        count = 0

        def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
            leaves = tree_leaves(args)
            if leaves and isinstance(leaves[0], torch.Tensor) and leaves[0].dtype == torch.int64:
                self.count += "add_" in str(operator)
            return operator(*args, **(kwargs or {}))

    x, y, index, _ = tiny_batch()
    model = fastadv.build_model("preact_resnet18", width=4, num_classes=CLASSES).to(x.dtype)
    step = tiny_step(model, "pgd", optimizer=torch.optim.SGD(model.parameters(), 0.1), steps=2)
    step(x, y, index)
    with Additions() as seen:
        step(x, y, index)
    # A pass each, the step's own noise offset, and two counts of images that were not moved.
    assert seen.count == 3 + 1 + 2


def test_the_counters_return_after_an_error():
    model = Odd()
    counters = BatchNormCounters(model)
    with counters.calibrating():
        model.eval()(torch.zeros(1, 3, 8, 8))
    before = dict(model.named_buffers())

    def interrupted():
        with counters.detached():
            assert model.once.num_batches_tracked is None
            assert model.twice.num_batches_tracked is not None
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    after = dict(model.named_buffers())
    assert after.keys() == before.keys()
    assert all(after[name] is before[name] for name in before)
    assert not counters.tensors


class ReadsACounter(TinyNet):
    """A forward whose result depends on a BatchNorm's number of batches."""

    def forward(self, x):
        seen = self.bn1.num_batches_tracked
        return super().forward(x) * (1 if seen is None else 1 / (1 + float(seen)))


def test_a_counter_that_the_forward_reads_stays_in_its_module():
    x, y, index, start = tiny_batch()
    model, other = ReadsACounter().double(), ReadsACounter().double()
    for each in (model, other):
        each.load_state_dict(tiny_model().state_dict())
    step = fastadv.step(model, sgd(model), "pgd", eps=EPS, alpha=0.05, steps=2, mode="eager")
    optimizer = sgd(other)
    for _ in range(2):
        step(x, y, index, start=start)
        x_adv = climb(other, x, start, lambda z: cross_entropy(z, y), 0.05, 2, "train")
        descend(optimizer, cross_entropy(other.train()(x_adv), y))
    assert_same(model, other)
