"""The example plugins: formulas, modes, resuming, passes. How plugins are found is in
``test_plugin_loading.py``."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import plugin_formulas as formulas
import pytest
import torch
from every_recipe import call, step_of
from plugin_files import FOLDER, METHOD_FILES, forgotten_after, lines_of_code, load
from test_cost import counted_in_an_update
from test_distributed import free_port, network
from tiny import assert_same, tiny_batch, tiny_model, tiny_step, twin
from tiny_capture import capture
from tiny_run import assert_same_run, run
from tiny_staged import PAD, staged_model, view_of
from torch import distributed
from two_processes import in_two_processes

from fastadv.algorithms.resolution import resolve
from fastadv.engine.process.distributed import leave
from fastadv.errors import UserError
from fastadv.training.training_step import Step


@pytest.fixture(autouse=True)
def _forgotten() -> Iterator[None]:
    with forgotten_after():
        yield


@pytest.mark.parametrize("file", sorted(FOLDER.glob("*.py")), ids=lambda file: file.stem)
def test_a_plugin_is_short_and_uses_public_names(file: Any) -> None:
    text = file.read_text()
    assert lines_of_code(text) <= 60
    imported = [line.split()[1] for line in text.splitlines() if line.startswith(("from ", "imp"))]
    ours = {name for name in imported if name.startswith("fastadv")}
    assert ours <= {"fastadv", "fastadv.declared", "fastadv.algorithms.contract"}


def test_every_example_is_tested() -> None:
    assert {file.stem for file in FOLDER.glob("*.py")} == set(METHOD_FILES.values())


def batches(count: int) -> formulas.Batches:
    return [tiny_batch(seed=update)[:3] for update in range(count)]


def trained(
    method: str, data: formulas.Batches, *, crops: bool = False, weights: int = 2, **options: Any
) -> Step:
    """A step after ``data``, on the network drawn from the seed ``weights``."""
    step = tiny_step(tiny_model(weights), method, **options)
    for update, (x, y, index) in enumerate(data):
        step(x, y, index, view=view_of(len(y), update) if crops else None)
    assert step.healthy()
    return step


def test_mart() -> None:
    load("mart")
    model, data = tiny_model(), batches(3)
    step = trained("mart", data, steps=3, alpha=0.04, beta=2.0)
    formulas.mart(model, data, beta=2.0, steps=3, alpha=0.04)
    assert_same(step.model, model)


def test_nuat() -> None:
    signs = load("nuat") and resolve("nuat").start.point.__globals__["SIGNS"]
    model, data = tiny_model(), batches(4)
    step = trained("nuat", data, total_steps=4, steps_per_epoch=1)
    weights = formulas.nuat(model, data, signs)
    assert 0 == weights[0] < weights[1] < weights[2] < weights[3] < 4.5
    assert_same(step.model, model)


def test_elle_a() -> None:
    module = load("elle_a")
    streams = (module.FIRST, module.SECOND, module.BETWEEN)
    model, data = tiny_model(4), batches(8)
    options = {"sensitivity": 0.3, "decay": 0.9}
    step = trained("elle-a", data, weights=4, reg_weight=5.0, **options)
    weights = formulas.elle_a(model, data, streams, 5.0, **options)
    assert {0.0, 5.0, 4.5} <= set(weights)  # not yet, after a jump, after none
    assert_same(step.model, model)


def test_fgsm_mep() -> None:
    module = load("fgsm_pgi")
    model, data = tiny_model(), batches(5)
    index = data[0][2]  # the same samples in every epoch: their momenta add up
    data = [(x, y, index) for x, y, _ in data]
    times = {"total_steps": 5, "steps_per_epoch": 1}
    step = trained("fgsm-mep", data, crops=True, pad=PAD, reset_every=3, **times)
    formulas.fgsm_mep(model, data, module.INITIAL, reset_every=3)
    assert_same(step.model, model)


def test_eps_ramp() -> None:
    module = load("eps_ramp")
    model, data = tiny_model(), batches(6)
    times = {"total_steps": 6, "steps_per_epoch": 2}
    step = trained("eps-ramp", data, ramp_epochs=2, steps=3, **times)
    formulas.eps_ramp(model, data, module.RADIUS, per_epoch=2, ramp=2, steps=3)
    assert_same(step.model, model)


@pytest.mark.parametrize("method", METHOD_FILES)
def test_a_captured_step_computes_the_same(method: str) -> None:
    load(METHOD_FILES[method])
    eager, captured = run(method), run(method, "captured")
    assert_same_run(eager, captured, tolerance=1e-9)
    assert captured.step.internals.passes.recorded == 2  # the full batch and the short one


@pytest.mark.parametrize(
    "method", [pytest.param(m, marks=() if m == "mart" else pytest.mark.slow) for m in METHOD_FILES]
)
def test_a_compiled_step_computes_the_same(method: str) -> None:
    load(METHOD_FILES[method])
    eager, compiled = run(method), run(method, "compiled")
    assert_same_run(eager, compiled, tolerance=1e-9)
    assert compiled.compilations[0] >= 2
    assert sum(compiled.compilations[1:]) == 0


@pytest.mark.parametrize("after_a_call", [False, True])
@pytest.mark.parametrize("method", METHOD_FILES)
def test_a_resumed_run_is_bit_for_bit_the_same(method: str, after_a_call: bool) -> None:
    load(METHOD_FILES[method])
    options = {"reset_every": 0} if method == "fgsm-mep" else {}  # or the state would begin anew
    step = step_of(method, staged_model(), **options)
    for update in range(2):
        call(step, update)
    other = step_of(method, twin(step.model), **options)
    saved = copy.deepcopy((step.state_dict(), step.optimizer.state_dict()))
    if after_a_call:
        call(other, 9)
        other.model.load_state_dict(step.model.state_dict())
    other.load_state_dict(saved[0])
    other.optimizer.load_state_dict(saved[1])
    for update in (2, 3):
        losses = [one_call["loss"] for one_call in (call(step, update), call(other, update))]
        assert torch.equal(*losses)
    assert_same(step.model, other.model, tolerance=0)
    assert step.state.keys() == other.state.keys()
    for name, tensor in step.state.items():
        assert torch.equal(tensor, other.state[name]), name


@pytest.mark.parametrize(
    ("method", "options"),
    [
        *((method, {}) for method in METHOD_FILES),
        ("mart", {"weights": "awp"}),
        ("elle-a", {"adversary": "pgd"}),
        ("eps-ramp", {"restarts": 2}),
    ],
)
def test_a_plugin_makes_the_passes_that_are_counted(method: str, options: dict[str, Any]) -> None:
    load(METHOD_FILES[method])
    seen, expected = counted_in_an_update(method, **options)
    assert seen == expected


@pytest.mark.parametrize(
    ("method", "options", "reason"),
    [
        ("mart", {"adversary": "none", "start": "none"}, "identically 0"),
        ("nuat", {"adversary": "none", "start": "none"}, "identically 0"),
        ("nuat", {"adversary": "pgd", "restarts": 2}, "restarts compare the loss of each sample"),
        ("fgsm-mep", {"start": "uniform"}, "this adversary begins where its own definition says"),
    ],
)
def test_a_plugins_refusals(method: str, options: dict[str, Any], reason: str) -> None:
    load(METHOD_FILES[method])
    with pytest.raises(UserError, match=reason):
        resolve(method, options)


@pytest.mark.parametrize("method", ["nuat", "elle-a", "fgsm-mep"])
def test_an_update_of_several_calls_is_refused_with_the_reason(method: str) -> None:
    load(METHOD_FILES[method])
    x, y, index, _ = tiny_batch()
    step = tiny_step(tiny_model(), method, total_steps=4, steps_per_epoch=2)
    with pytest.raises(UserError, match=r"update=False is not possible with .* (a|every) call"):
        step(x, y, index, update=False)


def test_fgsm_mep_is_refused_in_an_l2_ball_and_its_regularizer_without_a_start() -> None:
    load("fgsm_pgi")
    with pytest.raises(UserError, match="take norm='linf'"):
        tiny_step(tiny_model(), "fgsm-mep", norm="l2", total_steps=2, steps_per_epoch=1)
    x, y, index, _ = tiny_batch()
    step = tiny_step(tiny_model(), "standard", regularizer="start-and-end")
    with pytest.raises(UserError, match="needs an attack with a start"):
        step(x, y, index)


def test_a_radius_per_channel_is_refused_by_the_ramp() -> None:
    load("eps_ramp")
    with pytest.raises(UserError, match="one eps for all channels"):
        tiny_step(tiny_model(), "eps-ramp", eps=(0.1, 0.2, 0.1), steps_per_epoch=1, total_steps=2)


def test_what_an_update_that_does_not_count_leaves_in_the_state() -> None:
    """A loss that is not finite: ELLE-A's history and weight stay, where no copy is put back."""
    load("elle_a")
    x, y, index, _ = tiny_batch()
    step = capture(tiny_step(tiny_model(), "elle-a"))
    step(x, y, index)
    before = {name: tensor.clone() for name, tensor in step.state.items()}
    assert before["elle_history"][0] == 1
    with torch.no_grad():
        step.model.linear.bias[0] = float("nan")
    step(x, y, index)
    assert not step.healthy()
    for name, tensor in step.state.items():
        assert torch.equal(tensor, before[name]), name


def trained_by_halves(rank: int, world: int) -> dict[str, torch.Tensor]:
    """Weights and state of ELLE-A after some updates, in one of ``world`` processes."""
    with forgotten_after():
        load("elle_a")
        step = tiny_step(network(), "elle-a", reg_weight=5.0, sensitivity=0.0)
        share = 8 // world
        mine = slice(share * rank, share * rank + share)
        for update in range(6):
            x, y, index, _ = tiny_batch(seed=update)
            step(x[mine], y[mine], index[mine])
        return step.model.state_dict() | step.state


def halves_worker(rank: int, port: int, out: str) -> None:
    address = f"tcp://127.0.0.1:{port}"
    distributed.init_process_group("gloo", init_method=address, rank=rank, world_size=2)
    torch.save(trained_by_halves(rank, 2), f"{out}.{rank}")
    leave()


@pytest.mark.slow
def test_a_term_is_the_mean_of_all_processes(tmp_path: Path) -> None:
    """So that what is learned from it is the same in each."""
    out = str(tmp_path / "half")
    in_two_processes(halves_worker, free_port(), out)
    whole = trained_by_halves(0, 1)
    for rank in range(2):
        for name, value in torch.load(f"{out}.{rank}").items():
            torch.testing.assert_close(value, whole[name], rtol=1e-9, atol=1e-12, msg=name)
