"""Steps with own BatchNorm kernels in the benchmark: their names, their check, their ratios."""

from __future__ import annotations

import io

import pytest
import rich.console
import torch
from torch import nn

from fastadv.benchmark import ours, parity, running
from fastadv.benchmark.compare import Comparison, _ratio_rows
from fastadv.benchmark.interleave import Candidate
from fastadv.benchmark.ours import our_candidate
from fastadv.benchmark.parity import require_fused_parity, require_same_step
from fastadv.benchmark.results import Timed, fused_norm_rows, speedup_rows, step_rows
from fastadv.benchmark.setting import Setting
from fastadv.benchmark.specs import Spec, parse_specs
from fastadv.benchmark.table import norm_table
from fastadv.errors import UserError

CPU = torch.device("cpu")
TINY = Setting(width=4, batch_size=4, image_size=8)


def test_the_setting_of_a_method_is_no_option_of_its_parts() -> None:
    spec = Spec.parse("pgd:fused_norm=on:attack_bn=eval")
    assert (spec.options, spec.fused_norm) == ((("attack_bn", "eval"),), "on")
    assert str(spec) == "pgd:attack_bn=eval:fused_norm=on"
    assert Spec.parse(str(spec)) == spec
    assert spec.is_the_peers  # the update is theirs
    assert "fused_norm" not in spec.chosen
    assert str(spec.with_norm("auto")) == "pgd:attack_bn=eval"
    assert Spec.parse("pgd:fused_norm=auto") == Spec("pgd")
    with pytest.raises(UserError, match="Unknown fused_norm 'onn'; did you mean 'on'"):
        Spec.parse("pgd:fused_norm=onn")
    with pytest.raises(UserError, match="Unknown fused_norm 'ON'; did you mean 'on'"):
        Spec.parse("pgd:fused_norm=ON")
    with pytest.raises(UserError, match="Unknown option 'fused-norm'; did you mean 'fused_norm'"):
        Spec.parse("pgd:fused-norm=on")


def test_a_step_gets_the_setting_of_its_method(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ours, "WARM_CALLS", 1)
    asked = []
    monkeypatch.setattr(
        "fastadv.training.internals.choose", lambda word, device: bool(asked.append(word))
    )
    made = our_candidate(TINY, Spec.parse("fast:fused_norm=on"), "fp32", "eager")
    assert (made.name, asked) == ("fastadv fast:fused_norm=on fp32 eager", ["on"])
    assert (made.facts["method"], made.facts["fused_norm"]) == ("fast:fused_norm=on", False)
    made.close()


def _step(method: str, mode: str = "captured", **facts: object) -> Candidate:
    """A candidate whose own BatchNorm kernels run if it asks for them, as on a GPU."""
    fused = Spec.parse(method).fused_norm == "on"
    told = {"by": "fastadv", "method": method, "mode": mode, "dtype": "bf16", "fused_norm": fused}
    return Candidate(f"{method} {mode}", float, facts=told | {"attack_bn": "train"} | facts)


def _timed(times: dict[str, list[float]], *candidates: Candidate) -> Timed:
    return Timed(TINY, "bf16", candidates, times, None)


def test_a_step_is_compared_with_the_same_one_without_them_turn_by_turn() -> None:
    steps = [
        _step("pgd:fused_norm=on"),
        _step("pgd:fused_norm=off"),
        _step("pgd:fused_norm=on", "eager"),  # no other step in its mode
        _step("apart"),
        _step("apart:fused_norm=on"),
    ]
    times = {step.name: [1.0, 1.0, 1.0] for step in steps}
    times["pgd:fused_norm=off captured"] = [1.5, 2.0, 1.2]
    times["apart:fused_norm=on captured"] = [2.0, 1.0, 4.0]
    pgd, apart = fused_norm_rows(_timed(times, *steps), "the check")
    assert (pgd["ours"], pgd["without"]) == (steps[0].name, steps[1].name)
    assert (apart["ours"], apart["without"]) == (steps[4].name, steps[3].name)
    assert pgd["times"]["median"] == 1.5
    none = {"low95": None, "high95": None}  # of three turns
    assert apart["times"] == {"median": 0.5, "p10": 0.3, "p90": 0.9, "count": 3, **none}
    assert [pgd["ms"][which]["median"] for which in ("pytorch", "own")] == [1500.0, 1000.0]
    assert (pgd["kind"], pgd["mode"], pgd["config"]) == ("fused norm", "captured", TINY.as_row())
    assert {row["parity"] for row in (pgd, apart)} == {"the check"}
    out = io.StringIO()
    rich.console.Console(file=out, width=120).print(norm_table([pgd, apart]))
    (line,) = [line for line in out.getvalue().splitlines() if "pgd:fused_norm=on" in line]
    cells = line.split()
    assert cells[2:6] == ["4", "1,500", "1,000", "1.500"]


def test_no_speed_up_of_kernels_that_were_not_found_right() -> None:
    steps = [_step("pgd:fused_norm=on"), _step("pgd")]
    peer = Candidate("peer", float, facts={"by": "peer", "method": "pgd", "attack_bn": "train"})
    timed = _timed({"pgd:fused_norm=on captured": [1.0], "pgd captured": [2.0], "peer": [3.0]},
                   *steps, peer)  # fmt: skip
    (plain,) = speedup_rows(timed, "the modes")
    assert (plain["ours"], plain["parity"]) == ("pgd captured", "the modes")
    both = {row["ours"]: row["parity"] for row in speedup_rows(timed, "the modes", "the kernels")}
    assert both == {"pgd:fused_norm=on captured": "the kernels", "pgd captured": "the modes"}

    def kinds(**checked: str) -> list[str]:
        asked = Comparison(TINY, (), "bf16", ("captured",), 1, **checked)
        return [row["kind"] for row in _ratio_rows(asked, timed)]

    assert kinds(parity="the modes", fused_parity="") == ["speedup"]
    assert kinds(fused_parity="the kernels") == ["fused norm"]
    assert kinds() == []


def test_passes_with_pytorchs_batch_norm_are_not_those_of_a_step_with_own_kernels() -> None:
    steps = [_step(f"fast:fused_norm={word}") for word in ("off", "on")]
    names = [f"pass: {kind} bf16 captured bn=train" for kind in ("training", "input gradient")]
    passes = [Candidate(name, float, facts={"by": "fastadv", "pass": "a pass"}) for name in names]
    times = {name: [1.0] for name in [*names, *(step.name for step in steps)]}
    plain, fused = step_rows(_timed(times, *steps, *passes))
    assert plain["over_passes"]["median"] == 0.5
    assert "over_passes" not in fused


@pytest.fixture
def own_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Own BatchNorm kernels run wherever they are wanted, as on a GPU."""
    monkeypatch.setattr(parity, "choose", lambda setting, device: setting == "on")


@pytest.mark.usefixtures("own_kernels")
def test_own_kernels_are_compared_in_the_type_in_which_they_run(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seen = []
    forward = nn.Conv2d.forward

    def noting(module: nn.Conv2d, x: torch.Tensor) -> torch.Tensor:
        layout = x.is_contiguous(memory_format=torch.channels_last)
        seen.append((x.dtype, layout, torch.backends.cudnn.allow_tf32))
        return forward(module, x)

    monkeypatch.setattr(nn.Conv2d, "forward", noting)
    said = require_fused_parity(parse_specs("fast,fast:fused_norm=on"), ["eager"], CPU)
    assert said == (
        "one float32 step of a tiny network, own BatchNorm kernels in eager against PyTorch's in "
        "eager"
    )
    assert {entry for entry in seen if entry[0] is torch.float32} == {(torch.float32, True, False)}
    assert require_fused_parity(parse_specs("fast,fast:fused_norm=off"), ["eager"], CPU) is None


@pytest.mark.usefixtures("own_kernels")
@pytest.mark.parametrize(("factor", "right"), [(1 + 3e-7, True), (1.0003, False)])
def test_a_small_error_of_own_kernels_is_found_and_their_rounding_allowed(
    factor: float, right: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The factor is on every second value that BatchNorm returns."""
    real = parity._weights_after_a_step

    def after(spec: Spec, *given: object) -> dict[str, torch.Tensor]:
        with pytest.MonkeyPatch.context() as patch:
            if spec.fused_norm == "on":
                patch.setattr(torch, "batch_norm", _off_by(torch.batch_norm, factor))
            return real(spec, *given)

    monkeypatch.setattr(parity, "_weights_after_a_step", after)
    for spec in parse_specs("pgd:fused_norm=on,apart:fused_norm=on"):
        if right:
            require_same_step(spec, "eager", CPU)
            continue
        with pytest.raises(UserError, match=r"differs from eager .* after one float32 step"):
            require_same_step(spec, "eager", CPU)


def _off_by(batch_norm, factor):
    def bent(*given):
        y = batch_norm(*given)
        scale = torch.ones(y.numel(), dtype=y.dtype)
        scale[::2] = factor
        return y * scale.view_as(y)

    return bent


@pytest.mark.usefixtures("own_kernels")
def test_bench_compares_own_kernels_before_it_times_them(tmp_path, monkeypatch) -> None:
    asked = []

    def require(specs, modes, device):
        asked.append(([str(spec) for spec in specs], list(modes)))
        raise UserError("they differ")

    monkeypatch.setattr(running, "require_fused_parity", require)
    console = rich.console.Console(file=io.StringIO())
    specs = parse_specs("pgd:fused_norm=on,pgd:fused_norm=off")
    plan = [Comparison(TINY, specs, "fp32", ("eager", "compiled"), 1)]
    with pytest.raises(UserError, match="they differ"):
        running.run_comparisons(plan, tmp_path, console)
    assert asked == [(["pgd:fused_norm=on", "pgd:fused_norm=off"], ["eager", "compiled"])]
    assert not list(tmp_path.iterdir())
