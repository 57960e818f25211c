"""The registered operators: opcheck on each, and eager against torch.compile(fullgraph=True).

An entry without a schema is the reference inside a compiled region, and a kernel outside.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch._dynamo.testing
from torch import Tensor

from fastadv import kernels
from fastadv.kernels import dispatch
from fastadv.kernels.dispatch import OPERATORS

INDEX = torch.tensor([3, 0, 5])
VIEW = (
    INDEX,
    torch.tensor([-2, 5, 0]),
    torch.tensor([7, -1, 1]),
    torch.tensor([True, False, True]),
)


def images(seed: int, channels_last: bool = False) -> Tensor:
    x = torch.rand(3, 3, 9, 8, generator=torch.Generator().manual_seed(seed))
    return x.to(memory_format=torch.channels_last) if channels_last else x


def store(dtype: torch.dtype = torch.float32, h: int = 9, w: int = 8) -> Tensor:
    """Six rows of random pixels: a wrong row or channel gives other values."""
    generator = torch.Generator().manual_seed(3)
    if dtype == torch.uint8:
        return torch.randint(0, 256, (6, 3, h, w), dtype=dtype, generator=generator)
    return torch.rand(6, 3, h, w, dtype=dtype, generator=generator)


def logits(seed: int, requires_grad: bool = False) -> Tensor:
    z = torch.randn(6, 5, generator=torch.Generator().manual_seed(seed))
    return z.requires_grad_(requires_grad)


def layers(seed: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(s, generator=generator) for s in ((4, 3, 3, 3), (7,), (5, 2))]


ALPHA = torch.tensor(0.1)
SEED = (7, None, 0, torch.tensor(2**33))
ROWS = torch.tensor([0.1, 0.2, 0.3])
NORM = (torch.tensor([0.4, 0.5, 0.6]), ROWS, 1e-5, ROWS + 1, -ROWS)  # mean, variance, affine
STEP = (images(0), images(1) - 0.5, images(2, channels_last=True), 0.0, ALPHA, 0.2, None)
OPERATOR_CALLS: dict[str, tuple[object, ...]] = {
    "noise_uniform": (INDEX, [3, 5], *SEED, 1, torch.float32),
    "noise_normal": (INDEX, [7], *SEED, 1, torch.float16),
    "linf_start": (images(0, True), 0.1, None, INDEX, *SEED, 0.0, 1.0, 2),
    "l2_start": (images(0, True), 0.0, ROWS, INDEX, *SEED, 0.0, 1.0, 2),
    "linf_step": (*STEP, 0.0, 1.0),
    "l2_step": (*STEP, 0.0, 1.0),
    "linf_project": (images(0, True), images(1), 0.0, ROWS, 0.0, 1.0),
    "l2_project": (images(0), images(1), 0.1, None, 0.0, 1.0),
    "perturb_weights": (layers(0), layers(1), 0.0, torch.tensor(0.1), "global"),
    "restore_weights": (layers(0), layers(1), layers(2)),
    "top_n_sum": (logits(0, True), logits(1, True), 7),
    "crop_flip": (store(), *VIEW, 7, 6, torch.float16, 0.5, "reflect", True),
    "crop_flip_add": (store(), *VIEW, images(0, True), 0.3, None, 0.0, ROWS, 0.0, 1.0),
    "crop_flip_write": (store(), *VIEW, images(0), torch.tensor(True)),
    "crop_flip_ascend": (store(), *VIEW, images(0), 0.1, None, -1.0, 1.0, None),
}


REGISTERED = {name for name, operator in OPERATORS.items() if operator.traced}


@pytest.mark.parametrize("name", sorted(REGISTERED))
def test_opcheck(name: str) -> None:
    operator = getattr(torch.ops.fastadv, name).default
    torch.library.opcheck(operator, OPERATOR_CALLS[name])


PUBLIC_CALLS: dict[str, Callable[[], tuple[object, ...]]] = {
    "noise_uniform": lambda: (INDEX, (3, 5), 2**64 - 3, torch.tensor(2**40)),
    "noise_normal": lambda: (INDEX, (7,), torch.tensor(5), 9, 1, torch.float64),
    "linf_start": lambda: (images(0), 0.1, INDEX, 2**63, 4),
    "l2_start": lambda: (images(0), ROWS, INDEX, 1, torch.tensor(4)),
    "linf_step": lambda: (images(0), images(1) - 0.5, images(2), ALPHA, ROWS),
    "l2_step": lambda: (images(0), images(1) - 0.5, images(2), ROWS, 0.2),
    "linf_project": lambda: (images(0), images(1), ROWS),
    "l2_project": lambda: (images(0), images(1), 0.1),
    "perturb_weights": lambda: (layers(0), layers(1), 0.1, "tensor"),
    "restore_weights": lambda: (layers(0), layers(1), layers(2)),
    "top_n_sum": lambda: (logits(0), logits(1), 7),
    "crop_flip": lambda: (store(torch.uint8), *VIEW, (7, 6)),
    "crop_flip_add": lambda: (store(), *VIEW, images(0), ALPHA, ROWS),
    "crop_flip_write": lambda: (store(), *VIEW, images(0), torch.tensor(True)),
    "crop_flip_ascend": lambda: (store(), *VIEW, images(0) - 0.5, ALPHA),
    "trades_kl": lambda: (logits(0), logits(1)),
    "masked_ce": lambda: (logits(0), torch.arange(6) % 5, ALPHA + 1),
    "pad_channels": lambda: (images(0), 8, torch.bfloat16),
    "block_signs": lambda: (layers(0),),
    "block_noise": lambda: (layers(0), torch.rand(3, generator=torch.Generator().manual_seed(0))),
    "block_step_gradients": lambda: (layers(0), layers(1)),
    "not_finite": lambda: (layers(0), layers(1)),
    "put_back_unless": lambda: (layers(0), layers(1), torch.tensor(False)),
    "record_fault": lambda: (
        *(torch.tensor(-1), torch.tensor(0), torch.tensor(7)),
        *([None, torch.tensor(True), ALPHA], [True, True, False]),
    ),
    "look_at_batch": lambda: (
        *(images(0), INDEX, None, (0.2, 0.8), 1e-5, 5, 2, 9),
        [torch.tensor(False) for _ in range(3)],
    ),
    "unmoved_images": lambda: (images(0), images(0), images(1), 0.1),
    "norm_statistics": lambda: (
        *(images(0, True), images(1, True), torch.zeros(3), torch.ones(3), 0.1, 1e-5),
    ),
    "norm_apply": lambda: (images(0, True), *NORM, images(1, True) - 1, True),
    "norm_gradients": lambda: (
        *(images(1, True) - 0.5, images(0, True), images(2, True) - 0.5, *NORM),
        *(True, True, images(3, True), True, True),
    ),
}


FUSED = {
    *("block_noise", "block_signs", "block_step_gradients", "masked_ce", "trades_kl"),
    *("norm_apply", "norm_gradients", "norm_statistics"),
}
FUSED |= {"look_at_batch", "not_finite", "pad_channels", "put_back_unless", "record_fault"}
FUSED |= {"unmoved_images"}


def compiled_equals_eager(
    name: str, function: Callable[..., object]
) -> torch._dynamo.testing.EagerAndRecordGraphs:
    """``function`` as one graph equals the reference; returns the graphs that were compiled."""
    expected_arguments, arguments = PUBLIC_CALLS[name](), PUBLIC_CALLS[name]()
    expected = OPERATORS[name].reference(*expected_arguments)
    torch._dynamo.reset()
    graphs = torch._dynamo.testing.EagerAndRecordGraphs()
    result = torch.compile(function, backend=graphs, fullgraph=True)(*arguments)
    torch.testing.assert_close(result, expected)
    # In-place functions are held to what they changed.
    torch.testing.assert_close(tensors(arguments), tensors(expected_arguments))
    assert len(graphs.graphs) == 1
    return graphs


def operators(graphs: torch._dynamo.testing.EagerAndRecordGraphs) -> list[str]:
    """The names of the registered operators in what was compiled."""
    called = [str(node.target) for node in graphs.graphs[0].graph.nodes]
    return [target for target in called if target.startswith("fastadv.")]


@pytest.mark.parametrize("name", sorted(PUBLIC_CALLS))
def test_a_cpus_compiler_sees_the_reference(name: str) -> None:
    assert operators(compiled_equals_eager(name, getattr(kernels, name))) == []


@pytest.fixture
def on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """The public functions choose backends on this CPU as they do on a GPU."""
    monkeypatch.setattr(dispatch, "TRITON_DEVICE", "cpu")
    monkeypatch.setattr(dispatch, "why_not_triton", lambda *_asked: None)


@pytest.mark.usefixtures("on_a_gpu")
@pytest.mark.parametrize("name", sorted(PUBLIC_CALLS))
def test_a_gpus_compiler_sees_one_operator_or_what_it_can_fuse(name: str) -> None:
    found = operators(compiled_equals_eager(name, getattr(kernels, name)))
    assert len(found) == (name not in FUSED)


@pytest.mark.usefixtures("on_a_gpu")
@pytest.mark.parametrize("name", sorted(PUBLIC_CALLS))
def test_outside_of_compiled_regions_a_kernel_runs(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def triton(module: str, wanted: str) -> Callable[..., object]:
        assert module == OPERATORS[wanted].module
        asked.append(wanted)
        return OPERATORS[wanted].reference

    monkeypatch.setattr(dispatch, "triton_function", triton)
    getattr(kernels, name)(*PUBLIC_CALLS[name]())
    assert asked == [name]


def channels_last(value: Any) -> Any:
    """The same arguments, images and filters among them in the other layout."""
    if isinstance(value, Tensor):
        return value.to(memory_format=torch.channels_last) if value.dim() == 4 else value
    if isinstance(value, (list, tuple)):
        return type(value)(channels_last(each) for each in value)
    return value


@pytest.mark.parametrize(
    "layout", [pytest.param(tuple, marks=pytest.mark.slow), channels_last],
    ids=["contiguous", "channels_last"],
)  # fmt: skip
@pytest.mark.parametrize("name", sorted(PUBLIC_CALLS))
def test_compiled_through_autograds_tracing(name: str, layout: Callable[[Any], Any]) -> None:
    """The fakes agree with what runs: strides, dtypes and what is changed in place."""
    arguments, expected_arguments = layout(PUBLIC_CALLS[name]()), layout(PUBLIC_CALLS[name]())
    expected = OPERATORS[name].reference(*expected_arguments)
    torch._dynamo.reset()
    traced = OPERATORS[name].traced or getattr(kernels, name)
    result = torch.compile(traced, backend="aot_eager", fullgraph=True)(*arguments)
    torch.testing.assert_close(result, expected, check_stride=True)
    torch.testing.assert_close(tensors(arguments), tensors(expected_arguments))


def test_block_signs_of_bfloat16_made_inside_a_compiled_region() -> None:
    """Inductor keeps what a region makes in float32, so nothing is rounded to bfloat16 between.

    A sign does not change by that. Each product enters the sum without its rounding, which moves it
    by 2**-8 of its size at most: the tolerance is that of the sum of sizes.
    """

    def signs_and_sums(first: list[Tensor], second: list[Tensor]) -> tuple[list[Tensor], Tensor]:
        made = [a * b for a, b in zip(first, second, strict=True)]
        signs = kernels.block_signs(made)
        return signs, kernels.block_step_gradients(made, signs)

    first, second = ([t.bfloat16() for t in layers(seed)] for seed in (0, 1))
    signs, sums = signs_and_sums(first, second)
    torch._dynamo.reset()
    compiled = torch.compile(signs_and_sums, backend="inductor", fullgraph=True)
    found_signs, found_sums = compiled(first, second)
    assert all(torch.equal(a, b) for a, b in zip(found_signs, signs, strict=True))
    assert [t.dtype for t in found_signs] == [torch.bfloat16] * 3
    assert found_sums.dtype == torch.float32
    pairs = zip(first, second, strict=True)
    sizes = torch.stack([(a.double() * b.double()).abs().sum() for a, b in pairs])
    assert ((found_sums - sums).abs() <= 2**-8 * sizes).all()


def tensors(values: tuple[object, ...]) -> list[object]:
    return [v for v in values if isinstance(v, (Tensor, list))]


@pytest.mark.usefixtures("on_a_gpu")
@pytest.mark.parametrize("name", ["top_n_sum", "trades_kl", "masked_ce"])
def test_gradient_inside_a_compiled_region(name: str) -> None:
    second = torch.arange(6) % 5 if name == "masked_ce" else logits(1, True)
    last = {"top_n_sum": (7,), "trades_kl": (), "masked_ce": (1.5,)}[name]
    first = logits(0, True)
    wanted = [t for t in (first, second) if t.requires_grad]

    def gradients(function: Callable[..., Tensor | tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
        value = function(first, second, *last)
        value = value[0] if isinstance(value, tuple) else value
        return torch.autograd.grad((value * torch.arange(1, value.numel() + 1)).sum(), wanted)

    expected = gradients(OPERATORS[name].reference)
    traced = OPERATORS[name].traced
    if traced is not None:
        torch.testing.assert_close(gradients(traced), expected)
    torch._dynamo.reset()
    compiled = torch.compile(getattr(kernels, name), backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(gradients(compiled), expected)


def test_every_public_function_is_covered() -> None:
    assert set(OPERATORS) == set(PUBLIC_CALLS) == REGISTERED | FUSED
    assert not FUSED & REGISTERED
    assert set(OPERATOR_CALLS) == REGISTERED
    assert all(getattr(kernels, name).__name__ == name for name in OPERATORS)
