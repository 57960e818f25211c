"""The arithmetic of the benchmarks: percentiles, counted operations, rows, passes."""

import json
import statistics
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from fastadv import build_model
from fastadv.algorithms.contract import (
    DOUBLE_BACKWARD,
    FORWARD,
    INPUT_GRADIENT,
    SHARED,
    TRAINING,
    UNITS,
    Pass,
)
from fastadv.benchmark import clock, limits, ours, parity, plot, rows
from fastadv.benchmark.arithmetic import Spread, paired_ratio, percentile
from fastadv.benchmark.bound import Bound, measure_bound
from fastadv.benchmark.geometry import PASSES, geometry
from fastadv.benchmark.interleave import Candidate, interleave, warmed
from fastadv.benchmark.limits import Limits
from fastadv.benchmark.ours import make_step
from fastadv.benchmark.pass_timing import pass_name
from fastadv.benchmark.profiling import covered
from fastadv.benchmark.results import Timed, speedup_rows, step_rows
from fastadv.benchmark.setting import Setting
from fastadv.benchmark.specs import Spec, parse_specs, passes_of
from fastadv.cli.bench import bench
from fastadv.errors import UserError

PRODUCTS = ("forward", "input", "weight")
TINY = Setting(width=4, batch_size=4, image_size=16)


@pytest.fixture
def quick(monkeypatch):
    """Device limits and single convolutions timed for as short as possible; one call before."""
    monkeypatch.setattr(ours, "WARM_CALLS", 1)
    monkeypatch.setattr(limits, "COPY_BYTES", {"cpu": 2**16})
    monkeypatch.setattr(limits, "MATRIX_SIDE", {"cpu": 32})
    monkeypatch.setattr(clock, "SECONDS_PER_SAMPLE", {"cpu": 0.0})


@given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=30), st.floats(0, 1))
def test_percentile_is_numpys(values, share):
    assert percentile(values, share) == pytest.approx(np.percentile(values, 100 * share), abs=1e-6)


def test_paired_ratio_cancels_a_slowdown_of_a_whole_turn():
    ours = [1.0, 2.0, 1.5, 9.0, 1.1]
    peer = [3 * value for value in ours]
    assert paired_ratio(peer, ours) == Spread(3.0, 3.0, 3.0, 5)
    shifted = [*peer[1:], peer[0]]
    assert paired_ratio(shifted, ours).p90 > 3


def test_turns_alternate_and_each_candidate_runs_in_every_turn():
    seen = []
    candidates = [
        Candidate(name, lambda name=name: seen.append(name) or float(len(seen)))
        for name in ("a", "b", "c")
    ]
    times = interleave(candidates, 3)
    assert "".join(seen) == "abc" + "cba" + "abc"
    assert times["a"] == [1.0, 6.0, 7.0]
    assert [len(values) for values in times.values()] == [3, 3, 3]


def test_late_turns_are_left_out_but_never_below_three():
    candidate = Candidate("a", lambda: 1.0)
    assert len(interleave([candidate], 9, until=0.0)["a"]) == 3


def test_compile_seconds_are_what_exceeds_steady_steps():
    candidate = Candidate("a", lambda: 1.0, warm_seconds=(21.0, 1.0, 1.0))
    assert candidate.compile_seconds(1.0) == 20.0
    assert candidate.compile_seconds(100.0) == 0.0


def closed_formula(width: int, size: int) -> int:
    """Operations of a PreActResNet-18, written out by hand: a multiply-add counts as two."""
    pixels, total = size**2, 2 * size**2 * 27 * width
    before = width
    for stage in range(4):
        channels = width * 2**stage
        if stage:
            pixels //= 4
            total += 2 * pixels * before * channels  # the projection
        total += 2 * pixels * 9 * (before * channels + 3 * channels**2)
        before = channels
    return total + 2 * before * 10


@pytest.mark.parametrize(("width", "size"), [(64, 32), (16, 64)])
def test_flops_of_preact_resnet18(width, size):
    shape = geometry(build_model("preact_resnet18", width=width), (3, size, size))
    forward = closed_formula(width, size)
    first = 2 * size**2 * 27 * width
    assert shape.flops(FORWARD) == forward
    assert shape.flops(INPUT_GRADIENT) == 2 * forward
    assert shape.flops(TRAINING) == 3 * forward - first
    assert shape.flops(SHARED) == 4 * forward - first
    assert shape.flops(DOUBLE_BACKWARD) == 6 * forward - first
    if (width, size) == (64, 32):
        assert round(forward / 1e9, 2) == 1.11


class Counting(TorchDispatchMode):
    """Adds up the operations torch itself says it does."""

    total = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        count = flop_registry.get(function.overloadpacket)
        if count is not None:
            self.total += count(*args, **(kwargs or {}), out_val=result)
        return result


COUNTED = ("standard", "fast", "pgd", "trades", "rwp:weight_steps=3", "apart", "free", "pgd-igr")
COUNTED += ("fgsm-n-consistency", "pgd:restarts=2")
ALIKE = ("fgsm", "awp", "advlc", "fgsm-n-advlc", "pgd-cure", "pgd-gradalign", "pgd-logitalign")
ALIKE += ("fgsm-n-gradalign", "trades-te")


@pytest.mark.parametrize(
    "method", [*COUNTED, *(pytest.param(name, marks=pytest.mark.slow) for name in ALIKE)]
)
def test_counted_passes_equal_those_of_a_real_step(method):
    spec = Spec.parse(method)
    training = make_step(TINY, spec, "fp32", "eager")
    batch = TINY.batches(1, channels_last=True)[0]
    second = batch.x.flip(-1)
    training(batch.x, batch.y, batch.index, second=second)
    with Counting() as counted:
        training(batch.x, batch.y, batch.index, second=second)
    shape = geometry(TINY.make_model(), TINY.image_shape)
    bound = Bound(shape, TINY.batch_size, "fp32", Limits(1, 1), {})
    passes = passes_of(spec.plan())
    # Only the first convolution's input gradient may differ: some steps want it in the outer pass.
    assert counted.total == pytest.approx(bound.flops(passes), rel=0.02)


def test_methods_without_a_fixed_number_of_passes_are_not_counted():
    assert passes_of(Spec.parse("rwp:c_min=1.7").plan()) is None


def test_the_bound_adds_products_and_bytes():
    shape = geometry(TINY.make_model(), TINY.image_shape)
    alone = {
        product: {"forward": 1.0, "input": 10.0, "weight": 100.0} for product in shape.products
    }
    bound = Bound(shape, 4, "fp32", Limits(copy=float("inf"), matmul=1.0), alone)
    assert bound.of_pass(FORWARD, "train") == 21
    assert bound.of_pass(INPUT_GRADIENT, "train") == 21 + 210
    assert bound.of_pass(TRAINING, "train") == 21 + 2100 + 200
    slow = Bound(shape, 4, "fp32", Limits(copy=100.0, matmul=1.0), alone)
    more = 4 * shape.other_bytes(FORWARD, "train", 4) / 100
    assert slow.of_pass(FORWARD, "train") == pytest.approx(21 + more)
    passes = {Pass(FORWARD, "eval"): 1, Pass(TRAINING, "train"): 2}
    expected = slow.of_pass(FORWARD, "eval") + 2 * slow.of_pass(TRAINING, "train")
    assert slow.of_step(passes) == pytest.approx(expected)


def test_every_product_can_be_timed_alone():
    shape = geometry(TINY.make_model(), TINY.image_shape)
    bound = measure_bound(shape, 2, "fp32", Limits(1e9, 1e9), torch.device("cpu"), repeats=1)
    assert all(bound.of_pass(kind, "train") > 0 for kind in PASSES)


def test_rows_come_back_as_they_were_written(tmp_path):
    file = tmp_path / "results" / "a.jsonl"
    written = [{"kind": "step", "ms": {"median": 1.5}, "tf32": None}, {"kind": "limits"}]
    rows.append_rows(file, written[:1])
    rows.append_rows(file, written[1:])
    assert rows.read_rows(file) == written
    assert rows.read_rows(file.parent) == written
    file.write_text("{broken\n")
    with pytest.raises(UserError, match=r"a\.jsonl"):
        rows.read_rows(file)


def test_provenance_says_where_a_row_comes_from(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["/usr/bin/fastadv", "bench", "--methods", "pgd,rwp"])
    origin = rows.provenance(torch.device("cpu"))
    assert origin["command"] == "fastadv bench --methods pgd,rwp"
    assert origin["torch"] == torch.__version__
    assert json.loads(json.dumps(origin)) == origin
    name = rows.results_file(Path("x"), torch.device("cpu")).name
    assert torch.__version__.split("+")[0] in name
    assert " " not in name


def test_peers_are_compared_with_their_own_method_and_like_with_like():
    names = ("pgd", "pgd:attack_bn=eval", "pgd:steps=2", "fast")
    candidates = [
        Candidate(name, float, facts={
            "by": "fastadv", "method": name, "mode": "eager", "dtype": "fp32",
            "attack_bn": "eval" if "eval" in name else "train",
        })
        for name in names
    ]  # fmt: skip
    for bn in ("train", "eval"):
        candidates.append(
            Candidate(f"peer {bn}", float, facts={"by": "peer", "method": "pgd", "attack_bn": bn})
        )
    times = {candidate.name: [2.0 + ("peer" in candidate.name)] * 3 for candidate in candidates}
    shape = geometry(TINY.make_model(), TINY.image_shape)
    timed = Timed(TINY, "fp32", candidates, times, Bound(shape, 4, "fp32", Limits(1, 1), {}))
    found = {
        (row["peer"], row["ours"]): row["times"]["median"] for row in speedup_rows(timed, "tests")
    }
    assert found == {
        ("peer train", "pgd"): 1.5,
        ("peer eval", "pgd"): 1.5,
        ("peer eval", "pgd:attack_bn=eval"): 1.5,
    }


def test_union_of_intervals():
    assert covered([(0, 2), (1, 3), (5, 6), (5.5, 5.7)]) == 4
    assert covered([]) == 0


def test_unknown_names_and_options_are_refused_at_once():
    with pytest.raises(UserError, match="did you mean 'pgd'"):
        parse_specs("pdg")
    with pytest.raises(UserError, match="attack_bn"):
        parse_specs("pgd:attack_b=eval")
    with pytest.raises(UserError, match="options are written as"):
        parse_specs("pgd:eval")


def test_failing_parity_tests_prevent_a_speed_up(tmp_path, monkeypatch):
    (tmp_path / "tests").mkdir()
    tests = tmp_path / "tests" / "test_modes.py"
    tests.write_text("def test_modes():\n    assert 1 + 1 == 2\n")
    parity.run_parity_tests(tmp_path)
    tests.write_text("def test_modes():\n    assert 1 + 1 == 3\n")
    monkeypatch.setattr(parity, "repository", lambda: tmp_path)
    with pytest.raises(UserError, match="parity tests fail, so no speed-up"):
        bench(methods="pgd", modes="eager", peers=True, device="cpu", out=tmp_path)
    assert not list(tmp_path.glob("*.jsonl"))


def test_a_mode_with_other_numbers_is_refused_without_a_checkout(monkeypatch):
    monkeypatch.setattr(parity, "repository", lambda: None)
    real = parity._weights_after_a_step

    def bent(spec, mode, device, dtype):
        assert dtype is torch.float64
        found = real(spec, "eager", device, dtype)
        if mode == "compiled":
            found["linear.weight"] += 1e-7
        return found

    monkeypatch.setattr(parity, "_weights_after_a_step", bent)
    device = torch.device("cpu")
    assert "definition" in parity.require_parity([Spec("fast")], ["eager"], device)
    with pytest.raises(UserError, match=r"differs from eager .* in linear\.weight"):
        parity.require_parity([Spec("fast")], ["eager", "compiled"], device)


@pytest.mark.usefixtures("quick")
def test_bench_writes_consistent_rows(tmp_path):
    bench(
        methods="pgd:steps=2,apart", width=4, image_size=8, batch_size="4,8", dtype="fp32",
        modes="eager", repeats=2, plot=tmp_path / "plot.png", out=tmp_path, device="cpu",
    )  # fmt: skip
    found = rows.read_rows(tmp_path)
    steps = [row for row in found if row["kind"] == "step"]
    assert [row["config"]["batch_size"] for row in steps] == [4, 4, 8, 8]
    for row in steps:
        assert row["images_per_s"] == pytest.approx(
            1e3 * row["config"]["batch_size"] / row["ms"]["median"], rel=1e-2
        )
        assert row["over_bound"] == pytest.approx(row["ms"]["median"] / row["bound_ms"], rel=1e-2)
        assert row["over_passes"]["count"] == row["ms"]["count"] == 2
    assert steps[0]["passes"] == {"input gradient": 2, "training": 1}
    assert (tmp_path / "plot.png").stat().st_size > 5000


def test_a_step_is_compared_with_its_passes_in_their_batch_norm_modes():
    facts = {"by": "fastadv", "mode": "eager", "dtype": "fp32", "attack_bn": "eval"}
    step = Candidate("trades", float, facts={**facts, "method": "trades"})
    times = {
        pass_name(kind, "fp32", "eager", bn): [count * (10.0 if bn == "eval" else 1.0)] * 2
        for kind, count in UNITS.items()
        for bn in ("train", "eval")
    }
    times["trades"] = [2 * 216.0, 3 * 216.0]  # 10 (1 forward + 10 x 2) + 2 x 3
    shape = geometry(TINY.make_model(), TINY.image_shape)
    bound = Bound(
        shape, 4, "fp32", Limits(1, 1), {p: dict.fromkeys(PRODUCTS, 1.0) for p in shape.products}
    )
    (row,) = step_rows(Timed(TINY, "fp32", [step], times, bound))
    assert row["passes_ms"]["median"] == 216e3
    assert row["over_passes"]["median"] == 2.5


ALL_KINDS = "fgsm-n-advlc,fgsm-n-igr,fgsm-n-cure,fgsm-n-kdsa,fgsm-n-consistency,trades-te:steps=1"


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize(
    "methods", [f"{ALL_KINDS},free:replays=2", pytest.param("all", marks=pytest.mark.slow)]
)
def test_every_method_has_a_ratio(methods, tmp_path):
    bench(
        methods=methods, width=4, image_size=8, batch_size="4", dtype="fp32", modes="eager",
        repeats=1, out=tmp_path, device="cpu",
    )  # fmt: skip
    steps = [row for row in rows.read_rows(tmp_path) if row["kind"] == "step"]
    assert [row["method"] for row in steps] == [str(spec) for spec in parse_specs(methods)]
    assert all(row["over_passes"]["median"] > 0 for row in steps)


@pytest.mark.usefixtures("quick")
def test_bench_profile_writes_a_trace(tmp_path, capsys):
    bench(
        methods="fast", width=4, image_size=8, batch_size="4", dtype="fp32", modes="eager",
        repeats=1, profile=True, out=tmp_path, device="cpu",
    )  # fmt: skip
    trace = json.loads(next(tmp_path.glob("*.trace.json")).read_text())
    assert any("convolution" in event.get("name", "") for event in trace["traceEvents"])
    assert "heaviest operations" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("wrong", "sentence"),
    [
        ({"modes": "compield"}, "did you mean 'compiled'"),
        ({"dtype": "bf17"}, "did you mean 'bf16'"),
        ({"batch_size": "1"}, "above 1"),
        ({"repeats": 0}, "--repeats must be at least 1"),
        ({"methods": "apart", "peers": True}, "add pgd to --methods"),
        ({"modes": "captured"}, "CUDA"),
    ],
)
def test_unsupported_benchmarks_are_refused_in_one_sentence(wrong, sentence, tmp_path):
    with pytest.raises(UserError, match=sentence):
        bench(**{"methods": "pgd", "device": "cpu", "out": tmp_path, **wrong})


def test_a_plot_without_matplotlib_says_how_to_get_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(UserError, match=r"fastadv\[report\]"):
        plot.require_matplotlib()


def test_median_of_an_even_number_lies_between():
    assert Spread.of([1, 2, 3, 10]).median == statistics.median([1, 2, 3, 10])


def test_a_unit_is_converted_in_every_number() -> None:
    assert Spread(2.0, 1.0, 4.0, 9).times(1e3) == Spread(2000.0, 1000.0, 4000.0, 9)


def test_the_peak_of_memory_counts_from_the_last_warm_call() -> None:
    happened = []

    class Memory:
        def forget(self) -> None:
            happened.append("forget")

    warmed(lambda: happened.append("call"), torch.device("cpu"), Memory(), 3)  # type: ignore[arg-type]
    assert happened == ["call", "call", "forget", "call"]
