"""``fastadv bench --json``: every kind of document fits the schema; ``--only`` chooses rows."""

import json
import re

import jsonschema
import pytest
import torch

from fastadv.benchmark import clock, compare, limits, ours, running
from fastadv.benchmark.asked import Asked, plan_of, selected
from fastadv.benchmark.document import document
from fastadv.benchmark.interleave import Candidate
from fastadv.benchmark.kernel_calls import LARGE, SMALL, kernel_calls
from fastadv.benchmark.rows import provenance, read_rows
from fastadv.benchmark.schema import schema_text
from fastadv.cli.bench import bench
from fastadv.errors import Interrupted, UserError
from fastadv.kernels.dispatch import OPERATORS

SCHEMA = jsonschema.Draft202012Validator(json.loads(schema_text()))
TINY = {"width": 4, "image_size": 8, "batch_size": "4", "dtype": "fp32", "modes": "eager"}
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """Device limits and operations alone timed for as short as possible; the threads restored."""
    monkeypatch.setattr(ours, "WARM_CALLS", 1)
    monkeypatch.setattr(limits, "COPY_BYTES", {"cpu": 2**16})
    monkeypatch.setattr(limits, "MATRIX_SIDE", {"cpu": 32})
    monkeypatch.setattr(clock, "SECONDS_PER_SAMPLE", {"cpu": 0.0})
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def written(path):
    found = json.loads(path.read_text())
    SCHEMA.validate(found)
    return found


def asked(**changes):
    values = {
        "methods": ("pgd",), "model": "preact_resnet18", "width": 4, "batch_sizes": (4,),
        "image_size": 8, "dtypes": ("fp32",), "modes": ("eager",), "repeats": 9, "peers": (),
        "steps": True, "passes": (), "operators": (), "device_type": "cpu", "threads": 1,
    }  # fmt: skip
    return Asked(**values | changes)


def test_the_schema_is_a_schema_and_is_printed(fastadv_command):
    jsonschema.Draft202012Validator.check_schema(json.loads(schema_text()))
    assert json.loads(fastadv_command("bench", "--schema").out) == json.loads(schema_text())


def test_a_document_of_steps_passes_and_kernels(tmp_path):
    file = tmp_path / "deep" / "a.json"
    bench(
        only="trades:steps=1,forward,linf_step", repeats=6, device="cpu", json_file=str(file),
        out=tmp_path, **TINY,
    )  # fmt: skip
    found = written(file)
    kinds = [entry["kind"] for entry in found["measurements"]]
    assert kinds == ["limits", "pass", "step", "operator"]
    assert found["complete"]
    assert found["settings"] == asked(
        methods=("trades:steps=1",), repeats=6, passes=("forward",), operators=("linf_step",),
        threads=torch.get_num_threads(),
    ).as_json()  # fmt: skip
    step = found["measurements"][2]
    assert len(step["turns_ms"]) == 6
    time, rate = step["measured"]["time_ms"], step["measured"]["rate_images_per_s"]
    assert time["low"] == pytest.approx(min(step["turns_ms"]), rel=1e-3)
    assert time["high"] == pytest.approx(max(step["turns_ms"]), rel=1e-3)
    assert rate["low"] == pytest.approx(4e3 / time["high"], rel=2e-3)
    assert rate["high"] == pytest.approx(4e3 / time["low"], rel=2e-3)
    assert (time["n"], rate["n"]) == (6, 6)
    assert Asked.from_json(found["settings"]).as_json() == found["settings"]


def test_every_kind_of_row_fits(tmp_path):
    """Also those that only a GPU, or peers, give."""
    spread = {"median": 2.0, "p10": 1.0, "p90": 3.0, "count": 9, "low95": 1.5, "high95": 2.5}
    origin, config = provenance(CPU), plan_of(asked(), CPU)[0].setting.as_row()
    facts = {"by": "fastadv", "method": "pgd", "dtype": "fp32", "mode": "captured"}
    rows = [
        {
            "kind": "step", "name": "published fp32, TF32 off", **facts, "by": "published",
            "tf32": False, "version": "3.5", "layout": "contiguous", "attack_bn": None,
            "config": config, "ms": spread, "turns_ms": [2.0], "images_per_s": 9.0,
            "compile_s": 1.0, "peak_mib": None, "idle_share": 0.01, "over_bound": float("inf"),
        },
        {
            "kind": "speedup", "peer": "ART", "by": "art", "ours": "fastadv pgd", "mode": "eager",
            "dtype": "fp32", "peer_bn": "eval", "our_bn": "train", "config": config,
            "times": spread, "parity": "tests",
        },
        {
            "kind": "fused norm", "ours": "a", "without": "b", "mode": "captured",
            "dtype": "bf16", "attack_bn": "train", "config": config, "times": spread,
            "ms": {"own": spread, "pytorch": spread}, "parity": "one step",
        },
        {
            "kind": "kernels", "candidate": "c", **facts, "config": config, "count": 4,
            "wall_us": 1.0, "kernel_us": 1.0, "span_us": 1.0, "idle_share": None,
        },
        {
            "kind": "kernel", "candidate": "c", "name": "k", **facts, "config": config,
            "count": 2, "us": 1.0, "bytes": None, "of_copy": None,
        },
        {"kind": "idle", "name": "not of the document"},
    ]  # fmt: skip
    found = document([row | origin for row in rows], asked(), ["x: skipped"], complete=True)
    found = json.loads(json.dumps(found, allow_nan=False))
    SCHEMA.validate(found)
    assert [e["kind"] for e in found["measurements"]] == [
        "step", "speedup", "fused-norm", "kernels", "kernel",
    ]  # fmt: skip
    step, _, fused, kernels, kernel = found["measurements"]
    assert "over_bound_ratio" not in step["measured"]  # infinite on a device that takes no time
    assert fused["measured"]["faster_ratio"] == {"value": 2.0, "low": 1.5, "high": 2.5, "n": 9}
    assert kernels["counted"] == {"launches": 4}
    assert set(kernel["measured"]) == {"time_us"}


def test_every_number_has_a_unit_in_its_name():
    units = r"_(ms|us|s|mib|bytes|images_per_s|gb_per_s|tflop_per_s|ratio)$"
    for rule in json.loads(schema_text())["$defs"]["measurement"]["allOf"]:
        for name in rule["then"]["properties"]["measured"]["properties"]:
            assert re.search(units, name), name


def test_standard_output_has_the_document_alone(fastadv_command):
    said = fastadv_command(
        *("bench", "--only", "masked_ce", "--json", "-", "--repeats", 2, "--device", "cpu")
    )
    found = json.loads(said.out)
    SCHEMA.validate(found)
    assert [e["kind"] for e in found["measurements"]] == ["limits", "operator"]
    assert found["measurements"][1]["measured"]["time_ms"]["low"] is None  # of two turns
    assert "masked_ce" in said.err


@pytest.mark.parametrize(
    ("text", "methods", "passes", "operators", "peers"),
    [
        ("trades", ["trades"], [], [], []),
        ("pgd,linf_*", ["pgd"], [], ["linf_start", "linf_step", "linf_project"], []),
        ("helped", None, [], [], ["helped"]),
        ("kernel:linf_step", None, [], ["linf_step"], []),
        ("kernel: l2_step", None, [], ["l2_step"], []),
        ("pass:*", None, ["input gradient", "training"], [], []),
        ("step:fast,training", ["fast"], ["training"], [], []),
        ("pgd:steps=2", ["pgd:steps=2"], [], [], []),
        ("kernel:*", None, [], [*OPERATORS], []),
    ],
)
def test_rows_are_chosen_by_name(text, methods, passes, operators, peers):
    found = selected(asked(passes=("forward", "training")), text)
    assert found.steps is (methods is not None)
    assert list(found.methods) == (methods or ["pgd"])
    assert sorted(found.passes) == passes
    assert list(found.operators) == operators
    assert list(found.peers) == peers


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("trdaes", "did you mean 'trades'"),
        ("linf_stp", "did you mean 'linf_step'"),
        ("helpt", "did you mean 'helped'"),
        ("kernel:pgd", "Unknown row"),
        ("forward", "no pass 'forward' in pgd"),
        (" , ", "takes names of rows"),
        ("pgd:stepz=2", "steps"),
    ],
)
def test_a_name_that_is_none_is_answered_with_the_nearest(text, sentence):
    with pytest.raises(UserError, match=sentence):
        selected(asked(), text)


def test_peers_alone_need_no_parity(tmp_path, monkeypatch):
    monkeypatch.setattr(running, "require_parity", lambda *_: pytest.fail("nothing to compare"))
    facts = {"by": "published", "method": "pgd", "dtype": "fp32", "attack_bn": "train"}
    peer = Candidate("published fp32", lambda: 0.5, facts=facts)
    monkeypatch.setattr(compare.peer_list, "BESIDE_OURS", {"published": lambda setting: peer})
    bench(only="published", repeats=2, device="cpu", out=tmp_path, **TINY)
    assert [row["kind"] for row in read_rows(tmp_path)] == ["limits", "step"]


def interrupting(monkeypatch, at):
    """The only candidate takes no time; Ctrl-C comes in its turn number ``at``."""
    turns = []

    def turn():
        turns.append(None)
        if len(turns) == at:
            raise KeyboardInterrupt
        return 0.01 * len(turns)

    def make(setting, spec, dtype, mode):
        facts = {"by": "fastadv", "method": str(spec), "dtype": dtype, "mode": mode}
        return Candidate(f"fastadv {spec}", turn, facts={**facts, "attack_bn": "train"})

    monkeypatch.setattr(compare, "our_candidate", make)


@pytest.mark.parametrize(
    ("at", "turns", "interleaved"), [(5, 3, True), (2, 1, False), (1, 0, None)]
)
def test_ctrl_c_keeps_what_was_measured(at, turns, interleaved, tmp_path, monkeypatch):
    interrupting(monkeypatch, at)
    file = tmp_path / "a.json"
    with pytest.raises(Interrupted, match="what was measured is in"):
        bench(
            only="pgd", device="cpu", json_file=str(file), out=tmp_path / "rows",
            **TINY | {"batch_size": "4,8"},
        )  # fmt: skip
    found = written(file)
    assert not found["complete"]
    steps = [entry for entry in found["measurements"] if entry["kind"] == "step"]
    assert [len(entry["turns_ms"]) for entry in steps] == ([turns] if turns else [])
    assert [entry["interleaved"] for entry in steps] == ([interleaved] if turns else [])
    rows = read_rows(tmp_path / "rows")
    assert [row["kind"] for row in rows] == ["limits", *["step"] * len(steps)]
    assert not any("preliminary" in row for row in rows)


def test_ctrl_c_ends_with_130(fastadv_command, monkeypatch):
    interrupting(monkeypatch, 5)
    words = ("--only", "pgd", "--width", 4, "--image-size", 8, "--batch-size", 4)
    said = fastadv_command(
        "bench", *words, "--dtype", "fp32", "--modes", "eager", "--device", "cpu"
    )
    assert said.code == 130
    assert "Stopped early; what was measured is in" in said.err


def test_a_file_that_cannot_be_written_is_refused_before_anything_is_timed(tmp_path):
    (tmp_path / "file").write_text("")
    for name in (tmp_path / "file" / "a.json", tmp_path):
        with pytest.raises(UserError, match="--json"):
            bench(json_file=str(name), out=tmp_path / "rows", device="cpu")
    assert not (tmp_path / "rows").exists()


@pytest.mark.parametrize(
    "sizes", [SMALL, pytest.param(LARGE, marks=pytest.mark.slow)], ids=["small", "large"]
)
def test_every_kernel_has_a_call(sizes):
    calls = kernel_calls(sizes)
    assert set(calls) == set(OPERATORS)
    for name, make in calls.items():
        OPERATORS[name].reference(*make())
