"""The tables of scores: widths, every number in its place, characters that have a meaning."""

from __future__ import annotations

import csv
import io
import re
from dataclasses import replace

import numpy as np
import pytest
import rich.console

from fastadv.cli import score_table
from fastadv.run.several import MethodScores, Score, ScoreTable

N = 10_000
ATTACKS = ["clean", "pgd-20"]
SAID = "linf eps 0.03137, evaluated in float32"


def method(
    name: str, best: list[tuple[float, ...]], last: list[tuple[float, ...]] | None, n: int = N
) -> MethodScores:
    """Scores of the ``ATTACKS``, each a tuple over seeds."""
    runs = tuple(f"runs/{name}-{seed}" for seed in range(len(best[0])))
    weights = {"best": best} | ({} if last is None else {"last": last})
    scores = {
        which: {attack: Score(values, n) for attack, values in zip(ATTACKS, rows, strict=True)}
        for which, rows in weights.items()
    }
    return MethodScores(name, runs, scores)


def table(*methods: MethodScores, attacks: list[str] = ATTACKS) -> ScoreTable:
    return ScoreTable(list(methods), attacks, tuple(methods[0].scores), N, "test images", SAID, [])


SEEDS = method(
    "a_b & 5%", [(0.81, 0.82, 0.83), (0.50, 0.51, 0.55)], [(0.84,) * 3, (0.41, 0.42, 0.43)]
)
SINGLE = method("trades", [(0.8419,), (0.5231,)], [(0.8551,), (0.4445,)])


def printed(found: ScoreTable) -> str:
    text = io.StringIO()
    console = rich.console.Console(file=text, width=80, highlight=False)
    console.print(score_table.title(found))
    console.print(score_table.terminal(found))
    return text.getvalue()


def test_the_mean_and_deviation_of_seeds_and_the_interval_of_a_single_run() -> None:
    score = SEEDS.scores["best"]["pgd-20"]
    assert score.mean == pytest.approx(0.52)
    assert score.deviation == pytest.approx(np.std([0.50, 0.51, 0.55], ddof=1))
    assert score.interval is None
    single = SINGLE.scores["best"]["pgd-20"]
    assert single.deviation is None
    low, high = single.interval or (0, 0)
    for end in (low, high):  # Wilson (1927)
        assert abs(end - 0.5231) == pytest.approx(1.959963984540054 * (end * (1 - end) / N) ** 0.5)
    assert SEEDS.difference("pgd-20") == pytest.approx(0.52 - 0.42)


def test_the_table_of_the_terminal() -> None:
    text = printed(table(SEEDS, SINGLE))
    assert max(map(len, text.splitlines())) <= 80
    rows = [re.split(r"\s*│\s*", line.strip("│ \n")) for line in text.splitlines() if "│" in line]
    assert rows == [
        ["clean", "a_b & 5% (3 seeds)", "82.00 ± 1.00", "84.00 ± 0.00", "-2.00"],
        ["trades (1 seed)", "84.19 (83.5-84.9)", "85.51 (84.8-86.2)", "-1.32"],
        ["pgd-20", "a_b & 5% (3 seeds)", "52.00 ± 2.65", "42.00 ± 1.00", "10.00"],
        ["trades (1 seed)", "52.31 (51.3-53.3)", "44.45 (43.5-45.4)", "7.86"],
    ]
    assert "10,000 images" in text
    assert score_table.meaning(table(SEEDS, SINGLE)) == (
        "after ± the standard deviation over seeds, with the 95 % interval"
    )


def test_one_run_needs_no_column_for_its_method() -> None:
    found = table(method("trades", [(0.8419,), (0.5231,)], None))
    text = printed(replace(found, title="runs/trades-0, best weights"))
    assert "runs/trades-0, best weights" in " ".join(text.split())
    assert re.search(r"│ pgd-20 │ 52.31 │ +51.3-53.3 │", text)
    assert "95 % interval" in text
    assert "method" not in text
    assert "seed" not in text
    seeds = printed(table(SEEDS))
    assert re.search(r"│ pgd-20 │ 52.00 │ ± 2.65 │ 42.00 │ ± 1.00 │ 10.00 │", seeds)


@pytest.mark.parametrize("count", [1, 9])
def test_long_names_and_many_attacks_fit_80_columns(count: int) -> None:
    attacks = ["clean", "autoattack-standard", *(f"pgd-{n}" for n in range(10, 10 + count))]
    long = "fgsm-n-consistency, regularizer consistency, reg-weight 0.123456, averaging ema"

    def scores(values: tuple[float, ...]) -> dict[str, dict[str, Score]]:
        held = {attack: Score(values, N) for attack in attacks}
        return {"best": held, "last": held}

    seeds = MethodScores(long, ("a", "b"), scores((1.0, 1.0)))
    single = MethodScores("trades", ("runs/c",), scores((1.0,)))
    text = printed(table(seeds, single, attacks=attacks))
    assert max(map(len, text.splitlines())) <= 80
    assert text.count("100.00 ± 0.00") == 2 * len(attacks)
    assert text.count("100.00 (100.0-100.0)") == 2 * len(attacks)
    assert "…" not in text


def test_markdown() -> None:
    piped = method("a|b", [(0.8419,), (0.5231,)], [(0.8551,), (0.4445,)])
    lines = score_table.markdown(table(SEEDS, piped)).splitlines()
    cells = [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in lines[:4]]
    assert [len(row) for row in cells] == [7] * 4
    assert cells[0][1:] == [f"{a} {c}" for a in ATTACKS for c in ("best", "last", "diff")]
    assert cells[1] == ["---", *["---:"] * 6]
    assert cells[2][4:] == ["52.00 ± 2.65", "42.00 ± 1.00", "10.00"]
    assert cells[3] == [
        r"a\|b (1 seed)", "84.19 (83.5-84.9)", "85.51 (84.8-86.2)", "-1.32",
        "52.31 (51.3-53.3)", "44.45 (43.5-45.4)", "7.86",
    ]  # fmt: skip
    assert lines[5] == (
        f"Test accuracy, % of 10,000 images, {SAID}; after ± the standard deviation over "
        "seeds, with the 95 % interval."
    )


def test_latex_has_a_column_for_every_cell() -> None:
    lines = score_table.latex(table(SEEDS, SINGLE)).splitlines()
    assert lines[0].startswith("% Test accuracy, % of 10,000 images")
    assert lines[1] == r"\begin{tabular}{lrrrrrr}"
    assert lines[3] == r" & \multicolumn{3}{c}{clean} & \multicolumn{3}{c}{pgd-20} \\"
    assert lines[4] == r"\cmidrule(lr){2-4} \cmidrule(lr){5-7}"
    assert lines[5] == r"Method & Best & Last & Diff & Best & Last & Diff \\"
    assert lines[7] == (
        r"a\_b \& 5\% (3 seeds) & 82.00 $\pm$ 1.00 & 84.00 $\pm$ 0.00 & -2.00 & "
        r"52.00 $\pm$ 2.65 & 42.00 $\pm$ 1.00 & 10.00 \\"
    )
    assert r"52.31 {\scriptsize (51.3--53.3)} & 44.45" in lines[8]
    assert lines[-1] == r"\end{tabular}"


def test_latex_of_one_kind_of_weights_has_a_column_for_each_attack() -> None:
    lines = score_table.latex(table(method("trades", [(0.8419,), (0.5231,)], None))).splitlines()
    assert lines[1] == r"\begin{tabular}{lrr}"
    assert lines[3] == r"Method & clean & pgd-20 \\"


def test_csv() -> None:
    seeds, single = csv.DictReader(io.StringIO(score_table.as_csv(table(SEEDS, SINGLE))))
    assert seeds["method"] == "a_b & 5%"
    assert (seeds["seeds"], seeds["images"]) == ("3", "10000")
    assert float(seeds["pgd-20 best"]) == pytest.approx(52.0)
    assert float(seeds["pgd-20 best std"]) == pytest.approx(2.6458, abs=1e-4)
    assert seeds["pgd-20 best low"] == ""
    assert float(seeds["pgd-20 diff"]) == pytest.approx(10.0)
    assert single["pgd-20 last std"] == ""
    assert float(single["pgd-20 last low"]) == pytest.approx(43.4786, abs=1e-3)
    assert float(single["clean diff"]) == pytest.approx(-1.32)


def test_names_from_a_file_do_not_reach_the_terminal_as_codes() -> None:
    hostile = method("\x1b[2Jx[red]", [(0.8,), (0.5,)], None)
    for text in (printed(table(hostile, SINGLE_BEST)), score_table.markdown(table(hostile))):
        assert "\x1b" not in text
        assert "x[red]" in text


SINGLE_BEST = method("trades", [(0.8419,), (0.5231,)], None)


def test_a_format_with_a_typo() -> None:
    with pytest.raises(ValueError, match="did you mean 'markdown'"):
        score_table.require_format("markdwn")
