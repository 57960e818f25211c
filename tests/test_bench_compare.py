"""``fastadv bench --compare``: a slow-down is found, and noise is not taken for one."""

import json
import math
from itertools import combinations

import jsonschema
import numpy
import pytest
import torch
import typer
from test_bench_json import asked, quick  # noqa: F401 (an automatic fixture)

from fastadv.benchmark import compare
from fastadv.benchmark.arithmetic import Spread, median_interval
from fastadv.benchmark.document import document
from fastadv.benchmark.interleave import Candidate
from fastadv.benchmark.regression import change_table, regression, sentences
from fastadv.benchmark.rows import provenance
from fastadv.benchmark.schema import schema_text
from fastadv.benchmark.shift import ratio_of, together
from fastadv.cli.bench import bench
from fastadv.errors import UserError

TURNS = 9  # the default of --repeats
ROWS = 8
NOISES = {
    "even": lambda draw, size: draw.normal(0, 0.02, size),
    "wide": lambda draw, size: draw.normal(0, 0.15, size),
    # Of ten turns one is disturbed by other programs.
    "disturbed": lambda draw, size: (
        draw.normal(0, 0.02, size) + (draw.random(size) < 0.1) * draw.exponential(0.5, size)
    ),
    "skewed": lambda draw, size: draw.exponential(0.05, size),
}


def benchmark(times, device="cpu", **origin):
    """A document whose steps took ``times``: name -> ms of each turn."""
    config = {"model": "m", "width": 4, "batch_size": 4, "image_size": 8, "num_classes": 10}
    rows = [
        {"kind": "limits", "dtype": "fp32", "copy_gb_per_s": 2.0, "matmul_tflop_per_s": 3.0}
    ] + [
        {
            "kind": "step", "name": name, "by": "fastadv" if "peer" not in name else "peer",
            "method": "pgd", "config": config | {"seed": 0}, "turns_ms": list(turns),
            "ms": Spread.of(turns).as_row(), "images_per_s": 1.0,
        }
        for name, turns in times.items()
    ]  # fmt: skip
    known = provenance(torch.device("cpu")) | {"device": device} | origin
    return document([row | known for row in rows], asked(), [], complete=True)


def test_an_interval_of_the_median_is_that_of_the_binomial_distribution():
    assert median_interval(range(9)) == (1, 7)
    assert median_interval(range(6)) == (0, 5)
    assert median_interval(range(5)) is None
    draw = numpy.random.default_rng(0)
    held = [
        low <= 0 <= high
        for low, high in (median_interval(draw.normal(size=9)) for _ in range(4000))
    ]
    assert 0.95 <= sum(held) / len(held) <= 0.97  # 1 - 20 / 512


def test_the_interval_of_a_ratio_is_that_of_mann_and_whitney():
    """By counting all orders of four and five values: how often does the interval hold 1?"""
    held = total = 0
    for places in combinations(range(9), 4):
        new = [2.0**place for place in places]
        old = [2.0**place for place in range(9) if place not in places]
        found = ratio_of(new, old)
        held += found.low <= 1 <= found.high
        total += 1
    assert 0.95 <= held / total < 0.97
    found = ratio_of([2.0, 4.0, 8.0], [1.0, 2.0, 4.0])
    assert found.value == pytest.approx(2)
    assert found.low is None  # of three and three values no interval has 95 %
    assert ratio_of([3.0] * 4, [2.0] * 4).low == pytest.approx(1.5)


def test_level_of_many_intervals():
    assert together(0.95, 1) == pytest.approx(0.95)
    assert together(0.95, 10) == pytest.approx(0.995)


def runs(draw, noise, factor=1.0, rows=ROWS):
    def times(slow):
        return {
            f"fastadv row {k}": [*(100 * slow * numpy.exp(noise(draw, TURNS)))] for k in range(rows)
        }

    return benchmark(times(1.0)), benchmark(times(factor))


@pytest.mark.parametrize("noise", NOISES)
def test_the_same_program_twice_gives_no_alarm(noise):
    """Of 300 comparisons of eight rows each at most 5 % may report one, without any threshold too.
    The simulation is seeded."""
    draw = numpy.random.default_rng(1)
    alarms = {1.0: 0, 1.05: 0}
    for _ in range(300):
        old, new = runs(draw, NOISES[noise])
        for threshold in alarms:
            alarms[threshold] += bool(regression(old, new, threshold).slower)
    assert alarms[1.0] <= 15
    assert alarms[1.05] <= 15


@pytest.mark.parametrize(
    ("noise", "factor", "least"),
    [("even", 1.1, 95), ("disturbed", 1.1, 65), ("disturbed", 1.2, 85)],
)
def test_ten_percent_slower_is_found(noise, factor, least):
    """Turns that other programs disturb hide it more often."""
    draw, found = numpy.random.default_rng(2), 0
    for _ in range(100):
        old, new = runs(draw, NOISES[noise], factor=factor, rows=1)
        found += len(regression(old, new).slower)
    assert found >= least


def test_ten_percent_slower_is_found_in_one_of_many_rows():
    draw = numpy.random.default_rng(3)
    found = 0
    for _ in range(50):
        old, new = runs(draw, NOISES["even"])
        slow = next(e for e in new["measurements"] if e["name"] == "fastadv row 3")
        slow["turns_ms"] = [1.1 * taken for taken in slow["turns_ms"]]
        found += [each.name for each in regression(old, new).slower] == ["fastadv row 3"]
    assert found >= 45


def said(found):
    return " ".join(sentences(found))


def test_peers_and_faster_rows_raise_no_alarm():
    steady = [100.0 + k for k in range(TURNS)]
    slow = [1.5 * each for each in steady]
    old = benchmark({"fastadv a": slow, "peer": steady, "fastadv gone": steady})
    new = benchmark({"fastadv a": steady, "peer": slow, "fastadv b": steady})
    found = regression(old, new)
    assert found.slower == []
    verdicts = {each.name: each.verdict for each in found.changes}
    assert verdicts == {"fastadv a": "faster", "peer": "slower"}
    assert list(change_table(found).columns[0].cells) == ["a", "peer"]
    assert set(found.missing) == {
        "fastadv gone is only in the old benchmark",
        "fastadv b is only in the new benchmark",
    }
    assert "No row is slower beyond noise" in said(found)
    assert "copies 1.00 times as fast" in said(found)


def test_too_few_turns_prove_nothing_and_are_named():
    old, new = benchmark({"fastadv a": [1.0] * 3}), benchmark({"fastadv a": [9.0] * 3})
    found = regression(old, new)
    assert (found.slower, found.changes[0].verdict) == ([], "too few turns")
    assert "too few turns for an interval" in said(found)


def test_another_device_and_versions_are_said():
    times = {"fastadv a": [1.0 + k / 100 for k in range(TURNS)]}
    found = regression(benchmark(times), benchmark(times, device="other", torch="9.9"))
    assert "The devices differ (cpu, then other)" in said(found)
    assert f"torch {torch.__version__}, then 9.9" in said(found)
    with pytest.raises(UserError, match="no row in common"):
        regression(benchmark(times), benchmark({"fastadv b": [1.0]}))


@pytest.fixture
def candidate(monkeypatch):
    """A step of 10 ms on a clock of its own; ``slow[0]`` multiplies it."""
    slow, draw = [1.0], numpy.random.default_rng(0)

    def make(setting, spec, dtype, mode):
        facts = {"by": "fastadv", "method": str(spec), "dtype": dtype, "mode": mode}
        turn = lambda: 0.01 * slow[0] * math.exp(draw.normal(0, 0.01))  # noqa: E731
        return Candidate(f"fastadv {spec}", turn, facts={**facts, "attack_bn": "train"})

    monkeypatch.setattr(compare, "our_candidate", make)
    return slow


def measured(tmp_path, **options):
    file = tmp_path / "old.json"
    bench(
        only="pgd,fast", width=4, image_size=8, batch_size="4", dtype="fp32", modes="eager",
        device="cpu", json_file=str(file), out=tmp_path, **options,
    )  # fmt: skip
    return file


def test_the_rows_of_a_file_are_measured_again(candidate, tmp_path, fastadv_command):
    old, new = measured(tmp_path), tmp_path / "new.json"
    again = ("bench", "--compare", old, "--device", "cpu", "--json", new)
    same = fastadv_command(*again)
    assert (same.code, "No row is slower" in " ".join(same.out.split())) == (0, True)
    assert json.loads(new.read_text())["settings"] == json.loads(old.read_text())["settings"]
    candidate[0] = 1.2
    slower = fastadv_command(*again)
    assert slower.code == 3
    assert "Slower: pgd, fast" in slower.out
    assert max(map(len, slower.out.split("rows:")[0].splitlines())) <= 80
    found = json.loads(new.read_text())
    jsonschema.Draft202012Validator(json.loads(schema_text())).validate(found)
    assert found["comparison"]["regression"]
    assert [each["verdict"] for each in found["comparison"]["changes"]] == ["slower"] * 2
    ratio = found["comparison"]["changes"][0]["new_over_old_ratio"]
    assert ratio["low"] < 1.2 < ratio["high"]
    # Two files, without measuring; and a part of the rows; and another threshold.
    assert fastadv_command("bench", "--compare", old, "--with", new).code == 3
    assert fastadv_command("bench", "--compare", new, "--with", old).code == 0
    assert fastadv_command("bench", "--compare", old, "--with", new, "--threshold", 1.3).code == 0
    assert fastadv_command(*again, "--only", "fast").code == 3
    kept = json.loads(new.read_text())
    assert [e["name"] for e in kept["measurements"] if e["kind"] == "step"] == ["fastadv fast"]


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"methods": "pgd", "repeats": 3}, "omit --methods, --repeats"),
        ({"threshold": 0.9}, "at least 1"),
        ({"only": "trades"}, "Unknown row 'trades'"),
        ({"with_file": "missing.json"}, "Cannot read missing.json"),
        (
            {"with_file": "missing.json", "only": "pgd", "profile": True, "device": "cpu"},
            "--with measures nothing: omit --only, --profile, --device.",
        ),
    ],
)
def test_options_that_do_not_fit_are_refused(options, sentence, candidate, tmp_path):
    old = measured(tmp_path, repeats=1)
    measuring = {} if "with_file" in options else {"device": "cpu", "out": tmp_path}
    with pytest.raises(UserError, match=sentence):
        bench(compare=str(old), **measuring, **options)


def test_options_of_a_comparison_alone_are_refused(tmp_path):
    for options in ({"with_file": "a.json"}, {"threshold": 1.1}):
        with pytest.raises(UserError, match="--compare"):
            bench(out=tmp_path, **options)


@pytest.mark.parametrize(
    ("damage", "sentence"),
    [
        (lambda found: "{", "is not JSON"),
        (lambda found: "[]", "no benchmark"),
        (lambda found: json.dumps(found | {"version": 0}), "version 0 of the schema"),
        (lambda found: json.dumps(found | {"settings": {}}), "edited or damaged"),
        (lambda found: json.dumps(found | {"measurements": [3]}), "edited or damaged"),
        (
            lambda found: json.dumps(
                found | {"settings": found["settings"] | {"device_type": "cuda"}}
            ),
            "of a cuda device and this one is cpu",
        ),
        (
            lambda found: json.dumps(
                found | {"settings": found["settings"] | {"methods": ["pdg"]}}
            ),
            "did you mean 'pgd'",
        ),
    ],
)
def test_a_file_that_is_none_is_refused_in_a_sentence(damage, sentence, tmp_path):
    file = tmp_path / "old.json"
    file.write_text(damage(benchmark({"fastadv a": [1.0]})))
    with pytest.raises(UserError, match=sentence):
        bench(compare=str(file), device="cpu", out=tmp_path)


def test_a_direct_call_ends_with_the_exit_code(candidate, tmp_path):
    old = measured(tmp_path)
    candidate[0] = 1.5
    with pytest.raises(typer.Exit) as ended:
        bench(compare=str(old), device="cpu", out=tmp_path)
    assert ended.value.exit_code == 3


def leaves(value, path=()):
    """The path of every value in a document."""
    yield path
    inner = (
        value.items()
        if isinstance(value, dict)
        else enumerate(value)
        if isinstance(value, list)
        else ()
    )
    for key, each in inner:
        yield from leaves(each, (*path, key))


JUNK = (None, -1, 0, 1e400, "x", "\x1b[31m", [], {}, [None], True, float("nan"))


@pytest.mark.parametrize("every", [pytest.param(1, marks=pytest.mark.slow), 11])
def test_any_edited_file_is_read_or_refused_in_a_sentence(every, tmp_path, capsys):
    """Each value of a document is replaced by each kind of another one."""
    good = benchmark({"fastadv a": [1.0 + k / 100 for k in range(TURNS)], "peer": [1.0] * TURNS})
    file, same = tmp_path / "edited.json", tmp_path / "good.json"
    same.write_text(json.dumps(good))
    refused = []
    for path in list(leaves(good))[1::every]:
        for junk in JUNK:
            edited = json.loads(json.dumps(good))
            place = edited
            for key in path[:-1]:
                place = place[key]
            place[path[-1]] = junk
            file.write_text(json.dumps(edited))
            try:
                bench(compare=str(file), with_file=str(same))
            except UserError as error:
                refused.append(str(error))
            except typer.Exit:
                pass
    assert refused
    assert not any("\n" in sentence for sentence in refused)
    assert "\x1b" not in capsys.readouterr().out
