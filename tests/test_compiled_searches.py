"""Searches on a CPU with the model compiled: the same verdicts, from a few compilations."""

from __future__ import annotations

import copy
import logging
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from test_attacks import images, small_net
from test_search_passes import Norms
from tiny_run import Counting
from torch import Tensor, nn

from fastadv.engine.compiled import Runner
from fastadv.engine.model.compiled_forward import MOST_GRAPHS, SMALLEST, CompiledForward
from fastadv.errors import UserError
from fastadv.evaluation.accuracy import evaluate, verdicts_of
from fastadv.evaluation.attacks import inputs
from fastadv.evaluation.found import Found
from fastadv.evaluation.search.engine import Engine
from fastadv.evaluation.search.fixed import FixedEngine
from fastadv.evaluation.search.passes import Passes
from fastadv.evaluation.tally import Tally

EPS = 0.06
ATTACKS = ["clean", "pgd-3-2", "apgd-ce-4+fab-2+square-8"]  # FAB takes four gradients of one pass
COUNT = 90


def problem(model: nn.Module, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    """Images of which most are right without an attack."""
    x, _ = images(COUNT, dtype=dtype)
    with torch.no_grad():
        found = copy.deepcopy(model)(x.clone())
    y = found.argmax(1)
    y[::7] = (y[::7] + 1) % 5
    return x, y


def found(
    model: nn.Module,
    data: tuple[Tensor, Tensor],
    compiled: CompiledForward | None = None,
    *,
    size: int = 40,
    attacks: list[str] = ATTACKS,
    **options: Any,
) -> Found:
    x, y = data
    mode = "eager" if compiled is None else "compiled"
    batches = zip(x.split(size), y.split(size), strict=True)
    return verdicts_of(
        model, batches, attacks, eps=EPS, norm="linf", alpha=None, seed=3, mode=mode,
        compiled=compiled, **options,
    )  # fmt: skip


def counting() -> tuple[CompiledForward, Counting]:
    backend = Counting("aot_eager")
    return CompiledForward(backend), backend


def assert_alike(found: Found, expected: Found, tolerance: float = 1e-9) -> None:
    for name, ledger in expected.ledgers.items():
        own = found.ledgers[name]
        assert own.rows["fooled_by"].tolist() == ledger.rows["fooled_by"].tolist(), name
        for column in ("margin", "strength"):
            mine, other = (torch.from_numpy(each.rows[column]) for each in (own, ledger))
            torch.testing.assert_close(mine, other, rtol=tolerance, atol=tolerance, equal_nan=True)


def test_the_verdicts_are_those_of_the_model_as_written() -> None:
    model = small_net()
    data = problem(model)
    compiled, backend = counting()
    expected = found(model, data)
    for ledger in list(expected.ledgers.values())[1:]:
        assert 5 < ledger.right.sum() < 70
    kinds: set[type[Engine]] = set()

    def look(tally: Tally) -> None:
        kinds.update(type(each) for p in tally.pipelines.values() for each in p.engines)

    for size in (40, 37, 90):  # full batches and the rest of each: two graphs for all sizes
        assert_alike(found(model, data, compiled, size=size, between=look), expected)
        assert backend.count == 2
    assert compiled.works
    assert kinds == {Engine}  # whose batches stay full, not that of a device


def test_batches_of_a_few_images_are_not_compiled() -> None:
    model = small_net()
    data = problem(model)
    compiled, backend = counting()
    assert_alike(found(model, data, compiled, size=SMALLEST - 1), found(model, data))
    assert backend.count == 0


def test_each_type_of_a_search_has_its_graphs() -> None:
    model = small_net(torch.float32)
    data = problem(model, torch.float32)
    compiled, backend = counting()
    options: dict[str, Any] = {"attacks": ["pgd-3-2", "quick"], "search_dtype": "bf16"}
    own = found(model, data, compiled, **options)
    assert backend.count == 2  # float32 only confirms: it needs no gradient
    for ledger, other in zip(
        own.ledgers.values(), found(model, data, **options).ledgers.values(), strict=True
    ):
        # Rounding of bf16 may decide a verdict; what counts is confirmed in float32.
        assert (ledger.right != other.right).sum() <= 2
    assert len(compiled._compiled) == 2


def test_changed_weights_are_seen_and_compile_nothing() -> None:
    """The weights, the statistics that are folded where nothing is compiled, and the kernels in
    another layout are other tensors in each evaluation."""
    model: Any = small_net(torch.float32)
    data = problem(model, torch.float32)
    compiled, backend = counting()
    first = found(model, data, compiled)
    with torch.no_grad():
        model[0].weight.mul_(1.5)
        model[3].weight = nn.Parameter(model[3].weight * 0.5)
        model[4].running_mean.add_(0.3)
        model[7].weight.data = model[7].weight.data.clone().neg_()
    assert_alike(found(model, data, compiled), found(model, data), 1e-4)
    other = found(model, data, compiled).ledgers["clean"].right
    assert (other != first.ledgers["clean"].right).sum() > 20
    assert backend.count == 2
    assert [type(module) for module in model] == [type(module) for module in small_net()]


def test_passes_are_used_twice_and_only_small_batches_fold() -> None:
    model: Any = small_net()
    x, _ = images(32)
    compiled, backend = counting()
    passes = Passes(inputs.attacked_network(model, x.device, False, compiled=compiled))
    for factor in (1.0, 1.5):
        with torch.no_grad():
            model[0].weight.mul_(factor)
            model[1].running_var.mul_(factor)
        expected = model(x).detach()
        with passes:
            passes.prepare(x)
            with Norms() as few:
                torch.testing.assert_close(passes.logits(x[:8]), expected[:8])
            torch.testing.assert_close(passes.logits(x), expected)
            other = x[:20].contiguous(memory_format=torch.channels_last)
            torch.testing.assert_close(passes.logits(other), expected[:20])
            with Norms() as again:
                torch.testing.assert_close(passes.logits(x[:8]), expected[:8])
        assert (few.count, again.count) == (0, 0)
    assert backend.count == 1
    assert not any("forward" in vars(module) for module in model)


class Looking(nn.Sequential):
    """Python reads a value, so this is no single graph."""

    def forward(self, x: Tensor) -> Tensor:
        if float(x.detach().sum()) > 1e9:
            x = x / 2
        return super().forward(x)


class Numbering(nn.Sequential):
    """Each pass has its own number, for which it would be compiled."""

    number = 0

    def forward(self, x: Tensor) -> Tensor:
        self.number += 1
        return super().forward(x)


@pytest.mark.parametrize(
    ("kind", "search_dtype", "sentence"),
    [
        (Looking, "bf16", r"cannot be compiled as one graph \(.*\), so it runs as written\.$"),
        (Numbering, "float32", r"changes from pass to pass .*, so it runs as written\.$"),
    ],
)
def test_what_cannot_be_compiled_runs_as_written_after_one_warning(
    kind: Callable[..., nn.Module],
    search_dtype: str,
    sentence: str,
    caplog: pytest.LogCaptureFixture,
) -> None:
    model = kind(*small_net(torch.float32)).eval()
    data = problem(model, torch.float32)
    compiled, backend = counting()
    options: dict[str, Any] = {"attacks": ["pgd-2-2"], "search_dtype": search_dtype}
    expected = found(model, data, **options)
    with pytest.warns(UserWarning, match=sentence) as told:
        assert_alike(found(model, data, compiled, **options), expected, 1e-2)
    assert len([each for each in told if "written" in str(each.message)]) == 1
    assert "\n" not in str(told[0].message)
    assert not [each for each in caplog.records if each.levelno >= logging.WARNING]
    assert not compiled.works
    assert backend.count <= MOST_GRAPHS
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found(model, data, compiled, **options)


class Refusing(nn.Sequential):
    def forward(self, x: Tensor) -> Tensor:
        if x.shape[0] > 50:
            raise ValueError("at most 50 images")
        return super().forward(x)


def test_an_error_of_the_model_is_its_own() -> None:
    model = Refusing(*small_net()).eval()
    x, y = images(60)
    compiled, _ = counting()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(ValueError, match=r"^at most 50 images$"):
            found(model, (x, y), compiled, size=60)


class Spoiling(nn.Sequential):
    """Changes its input in place."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.mul_(0.9))


class Tallying(nn.Sequential):
    """A buffer counts the passes in eval mode, and the logits depend on it."""

    def __init__(self, *modules: nn.Module) -> None:
        super().__init__(*modules)
        self.register_buffer("passes", torch.zeros((), dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        self.passes += 1
        logits: Tensor = super().forward(x)
        return logits * (1 + 1e-12 * self.passes)


class Named(nn.Sequential):
    def forward(self, x: Tensor) -> Any:
        return {"features": x, "scores": super().forward(x)}


class Paired(nn.Sequential):
    def forward(self, x: Tensor) -> Any:
        return x.mean(), super().forward(x)


@pytest.mark.parametrize(
    ("kind", "output"),
    [
        (Spoiling, None),
        (Tallying, None),
        (Named, "scores"),
        pytest.param(Paired, 1, marks=pytest.mark.slow),
        (Paired, lambda returned: returned[1].neg().neg()),
    ],
)
def test_unusual_models(kind: Callable[..., nn.Module], output: Any) -> None:
    data = problem(small_net())
    models = [kind(*small_net()).eval() for _ in range(2)]
    compiled, backend = counting()
    # As many passes in both: all batches are full ones.
    results = [
        found(model, data, how, size=COUNT, attacks=["pgd-2", "fab-1"], output=output)
        for model, how in zip(models, (compiled, None), strict=True)
    ]
    assert_alike(*results)
    assert compiled.works
    assert backend.count == 2
    for own, expected in zip(*(model.state_dict().values() for model in models), strict=True):
        assert torch.equal(own, expected)


def test_the_mode_of_evaluate_compiles(monkeypatch: pytest.MonkeyPatch) -> None:
    backend = Counting("aot_eager")
    monkeypatch.setattr(inputs, "CompiledForward", lambda: CompiledForward(backend))
    model = small_net()
    x, y = problem(model)
    options: dict[str, Any] = {"attacks": ["clean", "pgd-3"], "eps": EPS}
    expected = evaluate(model, [(x, y)], **options)
    assert evaluate(model, [(x, y)], mode="auto", **options) == expected
    assert backend.count == 0
    for count in (2, 4):  # each call compiles, whatever happened to the model between
        assert evaluate(model, [(x, y)], mode="compiled", **options) == expected
        assert backend.count == count
    with pytest.raises(UserError, match="Unknown mode 'compile'; did you mean 'compiled'"):
        evaluate(model, [(x, y)], mode="compile", **options)


def test_a_device_has_whole_steps_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inputs, "recorder_for", lambda device, mode: None)
    device = torch.device("cuda")
    network = inputs.attack_passes(small_net(), device, False, mode="compiled").network
    assert network.runner.compiles
    assert network.compiled is None
    network = inputs.attack_passes(small_net(), torch.device("cpu"), False, mode="compiled").network
    assert not network.runner.compiles
    assert network.compiled is not None


def test_compiled_steps_of_fixed_size(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a device runs in mode "compiled", on a CPU."""
    kinds: set[type[Engine]] = set()
    backend = Counting("aot_eager")

    def passes(model: nn.Module, device: torch.device, amp: bool, output: Any, **_: Any) -> Passes:
        network = inputs.attacked_network(model, device, amp, output, compiles=True)
        network.runner = Runner(True, backend)  # type: ignore[arg-type]
        return Passes(network)

    def look(tally: Tally) -> None:
        kinds.update(type(each) for p in tally.pipelines.values() for each in p.engines)

    model = small_net()
    data = problem(model)
    options: dict[str, Any] = {"attacks": ["apgd-ce-4+fab-2"], "size": COUNT}
    expected = found(model, data, **options)
    monkeypatch.setattr(inputs, "attack_passes", passes)
    own = found(model, data, **options, between=look)
    assert kinds == {FixedEngine}
    assert backend.count > 0
    for name, ledger in expected.ledgers.items():
        assert own.ledgers[name].right.tolist() == ledger.right.tolist()


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_inductor(dtype: torch.dtype) -> None:
    model = small_net(dtype)
    data = problem(model, dtype)
    compiled = CompiledForward()
    attacks = ["pgd-3", "apgd-ce-3+fab-2"]
    tolerance = 1e-3 if dtype == torch.float32 else 1e-9
    for size in (40, 33):
        assert_alike(
            found(model, data, compiled, attacks=attacks, size=size),
            found(model, data, attacks=attacks, size=size),
            tolerance,
        )
    assert compiled.works


@pytest.mark.slow
def test_inductor_with_searches_in_bf16() -> None:
    model = small_net(torch.float32)
    data = problem(model, torch.float32)
    compiled = CompiledForward()
    options: dict[str, Any] = {"attacks": ["pgd-3"], "search_dtype": "bf16"}
    own, other = found(model, data, compiled, **options), found(model, data, **options)
    assert (own.ledgers["pgd-3"].right != other.ledgers["pgd-3"].right).sum() <= 2
    assert compiled.works
