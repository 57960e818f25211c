"""Pending tensors: what reads them, what does not, and what is left of them after a pass."""

import copy
import gc
import pickle
import weakref

import pytest
import torch
from fused_readers import KeepsOutputs, Reader
from odd_readers import made
from test_folding_readers import batch, step_of
from torch import nn
from torch.nn import functional

import fastadv
from fastadv.engine.model import fused_norm, pending
from fastadv.engine.model.fused_norm import fusing, residual
from fastadv.engine.model.pending import Pending
from fastadv.engine.model.python_state import PythonState
from fastadv.engine.model.replaced_norm import pytorchs
from fastadv.engine.model.static import why_not_static
from fastadv.errors import UserError

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def on_a_cpu(monkeypatch):
    monkeypatch.setattr(fused_norm, "DEVICES", ("cpu",))
    monkeypatch.setattr(fused_norm, "DTYPES", (torch.float64, torch.float32))


@pytest.fixture
def reads(monkeypatch):
    """A list that gets an entry for every pending tensor whose values are computed."""
    found = []
    own = Pending._values

    def values(self):
        if self._value is None:
            found.append(self)
        return own(self)

    monkeypatch.setattr(Pending, "_values", values)
    return found


def image(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shape = shape or (4, 3, 5, 5)
    x = torch.randn(shape, generator=generator, dtype=torch.float64)
    return x.to(memory_format=torch.channels_last)


def norm(channels=3, **options):
    torch.manual_seed(1)
    made = nn.BatchNorm2d(channels, **options).double()
    with torch.no_grad():
        made.weight.uniform_(0.5, 2)
        made.bias.uniform_(-1, 1)
    return made


def test_metadata_is_answered_without_the_values(reads):
    x = image().requires_grad_()
    plain = norm()(x)
    with fusing(CPU):
        h = norm()(x)
        assert type(h) is Pending
        assert isinstance(h, torch.Tensor)
        for name in ("shape", "dtype", "device", "ndim", "layout", "requires_grad", "is_leaf"):
            assert getattr(h, name) == getattr(plain, name)
        assert h.size() == plain.size()
        assert h.stride() == plain.stride()
        assert len(h) == len(plain)
        assert h.size(1) == 3
        assert h.dim() == 4
        assert h.numel() == plain.numel()
        assert h.is_contiguous(memory_format=torch.channels_last)
        assert not h.is_contiguous()
        assert h.is_floating_point()
        assert not h.is_cuda
        assert h.element_size() == 8
        assert h in {h: 1}
        assert not reads


def test_relu_and_sums_with_relu_do_not_read(reads):
    x = image().requires_grad_()
    with fusing(CPU):
        for relu in (functional.relu, torch.relu, torch.Tensor.relu, nn.ReLU(), nn.ReLU(True)):
            assert type(relu(norm()(x))) is torch.Tensor
            assert type(relu(norm()(x) + x)) is torch.Tensor
            assert type(relu(x + norm()(x))) is torch.Tensor
        out = norm()(x)
        out += x
        functional.relu(out)
        both = residual(x.sin(), x)
        assert type(both) is Pending
        functional.relu(norm()(both))
        assert type(both.read()) is torch.Tensor
        assert not reads


def test_everything_else_reads_once(reads):
    x = image().requires_grad_()
    expected = norm()(x)
    with fusing(CPU):
        h = norm()(x)
        torch.testing.assert_close(torch.tanh(h), expected.tanh())
        torch.testing.assert_close(h.mean() + h[0].sum(), expected.mean() + expected[0].sum())
        assert str(h) == str(h.read())
    assert len(reads) == 1


def test_what_the_kernels_do_not_add_is_read_first():
    x = image()
    with fusing(CPU):
        for other in (x[:, :1].clone(memory_format=torch.channels_last), x.float(), 0.5):
            assert type(norm()(x) + other) is torch.Tensor
            assert type(other + norm()(x)) is torch.Tensor


def test_a_sum_is_computed_with_the_statistics(reads):
    x = image().requires_grad_()
    with fusing(CPU):
        both = residual(x.sin(), x)
        h = norm()(both)
        torch.testing.assert_close(both.cos(), (x.sin() + x).cos())
        functional.relu(h)
        assert not reads


def test_a_sum_without_a_gradient_stays_so():
    with fusing(CPU):
        both = residual(image(), image(seed=1))
        assert functional.relu(norm()(both)).requires_grad
        assert not (both + 0).requires_grad


def test_two_norms_that_are_added_read_one(reads):
    x = image().requires_grad_()
    with fusing(CPU):
        functional.relu(norm()(x) + norm()(x.sin()))
        assert len(reads) == 1


def test_second_derivatives():
    def penalty(x, scale):
        x = x.clone().requires_grad_()
        first, second = norm(), norm()
        h = torch.relu(first(x))
        h = residual(scale * h, x)
        y = torch.relu(second(h)) + h
        z = torch.relu(first(y) + h) + first(h).sin()
        (gradient,) = torch.autograd.grad(z.square().sum(), x, create_graph=True)
        weights = [x, *first.parameters(), *second.parameters()]
        return torch.autograd.grad(gradient.square().sum(), weights)

    plain = penalty(image(), 0.3)
    with fusing(CPU):
        fused = penalty(image(), 0.3)
    for own, expected in zip(fused, plain, strict=True):
        torch.testing.assert_close(own, expected, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_a_compiler_sees_plain_operations(backend):
    """In a region that compiles, and in a model that the user has compiled."""
    torch._dynamo.reset()

    def block(x):
        return torch.relu(functional.batch_norm(residual(x.sin(), x), None, None, training=True))

    x = image()
    expected = block(x)
    compiled = torch.compile(block, fullgraph=True, backend=backend)
    torch.testing.assert_close(compiled(x), expected)
    with fusing(CPU):
        found = compiled(x)
    assert type(found) is torch.Tensor
    torch.testing.assert_close(found, expected)


def test_one_value_per_channel_is_refused():
    with fusing(CPU), pytest.raises(ValueError, match="more than 1 value per channel"):
        norm()(image(1, 3, 1, 1))


def test_it_is_used_in_passes_only_and_leaves_other_code_alone(monkeypatch):
    inside = []

    class Looks(Reader):
        def first(self, x):
            inside.append(functional.batch_norm)
            return super().first(x)

    x, y = batch()
    step = step_of(made(Looks), "pgd")
    step(x, y)
    assert fused_norm.batch_norm not in inside
    step.internals.net.fused_norm = True
    step(x, y)
    assert inside.count(fused_norm.batch_norm) == 3
    assert functional.batch_norm is pytorchs

    def other(*args, **kwargs):
        return pytorchs(*args, **kwargs)

    monkeypatch.setattr(functional, "batch_norm", other)
    step(x, y)
    assert inside[-3:] == [other] * 3


def test_another_memory_format_and_a_contiguous_model_are_pytorchs():
    with fusing(CPU):
        assert type(norm()(image().contiguous())) is torch.Tensor
        assert type(norm()(image().float().bfloat16().double())) is Pending
        assert type(nn.BatchNorm1d(3).double()(torch.randn(4, 3).double())) is torch.Tensor
        with torch.inference_mode():
            assert type(norm()(image())) is torch.Tensor
    assert type(norm()(image())) is torch.Tensor


def test_folds_are_still_used():
    x, y = batch()
    x = x.to(memory_format=torch.channels_last)
    model = made(Reader).to(memory_format=torch.channels_last)
    step = step_of(model)
    step.internals.net.fused_norm = True
    step(x, y)
    seen = []
    model.b1.register_forward_hook(lambda *found: None)  # a hook: this one is not folded
    own = fused_norm.measured
    try:
        fused_norm.measured = lambda *args, **kwargs: seen.append(1) or own(*args, **kwargs)
        with step.internals.net.attacking("eval"):
            step.internals.net.logits(x)
    finally:
        fused_norm.measured = own
    assert len(step.internals.net.copies.folds) == 2
    assert len(seen) == 1


def test_a_pass_is_static():
    x, _ = batch()
    step = step_of(made(KeepsOutputs).to(memory_format=torch.channels_last), "pgd")
    net = step.internals.net
    net.fused_norm = True
    state = PythonState({"the model": net.model})
    assert why_not_static(net, state, x.to(memory_format=torch.channels_last), "train") is None


def test_what_a_hook_keeps_is_an_ordinary_tensor_after_the_step():
    x, y = batch()
    x = x.to(memory_format=torch.channels_last)
    last = []
    for fused in (False, True):
        model = made(KeepsOutputs).to(memory_format=torch.channels_last)
        step = step_of(model, "pgd")
        step.internals.net.fused_norm = fused
        step(x, y)
        last.append(model.b1.last)
        with torch.no_grad():
            model.b1.weight.mul_(2)
    plain, kept = last
    assert type(kept) is Pending
    assert kept.source is None
    for found in (kept, kept.detach(), copy.deepcopy(kept.detach()), torch.cat([kept])):
        torch.testing.assert_close(found + 0, plain)
    torch.testing.assert_close(functional.relu(kept), functional.relu(plain))
    torch.testing.assert_close(pickle.loads(pickle.dumps(kept.detach())), plain.detach())


def test_nothing_is_kept_alive():
    x = image().requires_grad_()
    gc.collect()
    gc.disable()
    try:
        with fusing(CPU):
            h = norm()(x)
            first = [weakref.ref(h), weakref.ref(h.source)]
            y = functional.relu(h)
            del h
            assert [each() for each in first] == [None, None]
            both = residual(y, x)
            second = [weakref.ref(both), weakref.ref(both.source)]
            z = functional.relu(norm()(both)) + both
            del both
            assert [each() for each in second] == [None, None]
            z.sum().backward()
        assert pending._handed_out == []
    finally:
        gc.enable()


def test_returned_features():
    class Features(Reader):
        def forward(self, x):
            h = self.b1(self.c1(x))
            return {"logits": self.head(functional.relu(h)), "features": h, "list": [h + h]}

    x, y = batch()
    x = x.to(memory_format=torch.channels_last)
    states = []
    for fused in (False, True):
        model = made(Features).to(memory_format=torch.channels_last)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
        step = fastadv.step(
            model, optimizer, "pgd", eps=0.1, steps=2, output="logits", mode="eager"
        )
        step.internals.net.fused_norm = fused
        step(x, y)
        states.append(model.state_dict())
    for own, expected in zip(*(state.values() for state in states), strict=True):
        torch.testing.assert_close(own, expected, rtol=1e-12, atol=1e-12)


class Inner(nn.Module):
    def forward(self, h):
        return torch.relu(h) + h


@pytest.mark.parametrize("how", ["a module", "in place", "the model"])
def test_a_module_that_the_user_compiled_gets_plain_tensors(how):
    class Holds(Reader):
        def __init__(self):
            super().__init__()
            self.inner = Inner()

        def read(self, h):
            return self.inner(h)

    x, y = batch()
    x = x.to(memory_format=torch.channels_last)
    states = []
    for fused in (False, True):
        torch._dynamo.reset()
        model = made(Holds).to(memory_format=torch.channels_last)
        if how == "a module":
            model.inner = torch.compile(model.inner, backend="aot_eager")
        elif how == "in place":
            model.inner.compile(backend="aot_eager")
        whole = torch.compile(model, backend="aot_eager") if how == "the model" else model
        step = step_of(whole, "pgd")
        step.internals.net.fused_norm = fused
        step(x, y)
        states.append(model.state_dict())
    for own, expected in zip(*(state.values() for state in states), strict=True):
        torch.testing.assert_close(own, expected, rtol=1e-12, atol=1e-12)


def test_a_compiled_function_that_cannot_take_a_pending_tensor_is_refused():
    torch._dynamo.reset()
    inner = torch.compile(lambda h: torch.relu(h) + h, backend="aot_eager")

    class Calls(Reader):
        def read(self, h):
            return inner(h)

    x, y = batch()
    step = step_of(made(Calls).to(memory_format=torch.channels_last), "pgd")
    step.internals.net.fused_norm = True
    with pytest.raises(UserError, match=r"calls a compiled function.*fused_norm='off'"):
        step(x.to(memory_format=torch.channels_last), y)
