"""Markdown tables from rows: ``python bench/tables.py [--write README.md bench/README.md ...]``.

Without ``--write`` all tables are printed. With it, the text between ``<!-- bench:NAME -->`` and
``<!-- /bench:NAME -->`` in each file is replaced, for every NAME in ``TABLES``. A table shows the
newest run of each device and setting; those of ``count_tables.py`` show what has been counted.
``--take FILE`` first adds the rows of a packed file of ``gpu_suite.py``.
"""

import argparse
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
from count_tables import (
    bytes_table,
    counted_steps,
    kinds_table,
    launches_table,
    least_bytes_table,
)
from evaluation_table import evaluation_table, quick_table
from gpu_tables import (
    NONE_YET,
    fused_table,
    gpu_table,
    is_of_gpu,
    kernels_table,
    replay_table,
    shares_table,
    take,
    training_table,
)

from fastadv.algorithms.recipes.table import METHODS
from fastadv.benchmark.rows import newest, newest_of_each, read_rows
from fastadv.benchmark.table import number, percent
from fastadv.cli.explain import recipe_table
from fastadv.errors import UserError, unknown

RESULTS = Path(__file__).parent / "results"
Row = dict[str, Any]
Key = tuple[Any, ...]


def _where(row: Row) -> Key:
    config = row["config"]
    return (
        row["device"], row["threads"], config["model"], config["width"],
        config["batch_size"], config["image_size"],
    )  # fmt: skip


def speed_table(rows: list[Row]) -> str:
    """The peers and our modes, one table per device and setting."""
    ratios = newest([row for row in rows if row["kind"] == "speedup"], _where)
    parts = []
    for place in dict.fromkeys(map(_where, ratios)):
        here = [row for row in ratios if _where(row) == place]
        run = here[0]["run"]
        steps = [r for r in rows if r["kind"] == "step" and r["run"] == run and _where(r) == place]
        steps = [row for row in steps if row["method"].split(":")[0] == "pgd"]
        parts.append(_speed_lines(steps, here))
    return "\n\n".join(parts)


def _speed_lines(steps: list[Row], ratios: list[Row]) -> str:
    ours = [row for row in steps if row["by"] == "fastadv"]
    best = {}
    for row in sorted(ours, key=lambda row: -row["ms"]["median"]):
        best[row["attack_bn"]] = row["name"]
    lines = [
        "| PGD-10 AT step | BN in the attack | ms | 10-90 % | images/s | fastadv is faster by |",
        "|---|---|---:|---:|---:|---:|",
    ]
    for row in sorted(steps, key=lambda row: row["ms"]["median"]):
        # A peer is compared with our step in its BatchNorm mode; without one, in train mode.
        mine = best.get(row["attack_bn"], best.get("train"))
        found = [r for r in ratios if r["peer"] == row["name"] and r["ours"] == mine]
        times = f"{found[0]['times']['median']:.2f}x" if found else ""
        name = f"**{row['name']}**" if row["by"] == "fastadv" else row["name"]
        spread = f"{number(row['ms']['p10'])}-{number(row['ms']['p90'])}"
        cells = [name, row["attack_bn"], number(row["ms"]["median"]), spread]
        lines.append(_line([*cells, number(row["images_per_s"]), times]))
    return "\n".join([*lines, "", caption(steps[0])])


def methods_table(rows: list[Row]) -> str:
    """Rate of every method on a network of published width, and its time over its passes."""
    steps = [row for row in rows if row["kind"] == "step" and row["by"] == "fastadv"]
    steps = [row for row in steps if row["config"]["width"] is None]
    chosen = newest_of_each(steps, lambda row: (*_where(row), row["name"]))
    heads = ("method", "batch", "precision", "mode", "ms", "images/s", "TFLOP/s")
    heads += ("of matmul", "over its bound", "over its passes", "peak MiB", "compile s")
    lines = [_line(list(heads)), "|---|---:|---|---|" + "---:|" * 8]
    for row in chosen:
        passes = row.get("over_passes")
        lines.append(
            _line(
                [
                    row["method"],
                    str(row["config"]["batch_size"]),
                    row["dtype"],
                    row["mode"],
                    number(row["ms"]["median"]),
                    number(row["images_per_s"]),
                    number(row.get("tflop_per_s")),
                    percent(row.get("of_matmul")),
                    number(row.get("over_bound")),
                    number(passes["median"]) if passes else "",
                    number(row.get("peak_mib")),
                    number(row.get("compile_s")),
                ]
            )
        )
    return _table(lines, chosen)


def ratios_table(rows: list[Row]) -> str:
    """Time of every method's step over the sum of its passes, including narrow networks."""
    steps = [row for row in rows if row["kind"] == "step" and row.get("over_passes")]
    chosen = newest_of_each(steps, lambda row: (*_where(row), row["name"]))
    lines = [
        "| method | width | batch | precision | mode | passes | ms | over its passes | 10-90 % |",
        "|---|---|---:|---|---|---|---:|---:|---:|",
    ]
    for row in sorted(chosen, key=lambda row: -row["over_passes"]["median"]):
        config, ratio = row["config"], row["over_passes"]
        passes = ", ".join(f"{count} {kind}" for kind, count in row["passes"].items())
        cells = [row["method"], str(config["width"] or "published"), str(config["batch_size"])]
        cells += [row["dtype"], row["mode"], passes, number(row["ms"]["median"])]
        spread = f"{ratio['p10']:.2f}-{ratio['p90']:.2f}"
        lines.append(_line([*cells, f"{ratio['median']:.2f}", spread]))
    return _table(lines, chosen)


def passes_table(rows: list[Row]) -> str:
    """Time of each pass alone, and its bound."""
    passes = [row for row in rows if row["kind"] == "pass"]
    chosen = newest_of_each(passes, lambda row: (*_where(row), row["name"]))
    lines = [
        "| pass | width | batch | ms | bound, ms | over its bound |",
        "|---|---|---:|---:|---:|---:|",
    ]
    for row in chosen:
        config, name = row["config"], row["name"].removeprefix("pass: ")
        cells = [name, str(config["width"] or "published"), str(config["batch_size"])]
        cells += map(number, (row["ms"]["median"], row["bound_ms"], row["over_bound"]))
        lines.append(_line(cells))
    return _table(lines, chosen)


def robust_table(rows: list[Row]) -> str:
    """Minutes of training to a robust accuracy."""
    lines = [
        "| method | data | model | accuracy under | reached | minutes, mean | std |",
        "|---|---|---|---|---|---:|---:|",
    ]
    chosen = [row for row in rows if row["kind"] == "time to robust"]
    for row in chosen:
        config = row["config"]
        under = f"{100 * row['target']:.0f} % {config['attack']} ({config['judged_on']})"
        seeds = f"{row['reached']} of {row['seeds']} seeds"
        minutes = [number(row["mean_minutes"]), number(row["std_minutes"])]
        lines.append(
            _line([config["method"], config["data"], config["model"], under, seeds, *minutes])
        )
    return _table(lines, chosen)


def loaders_table(rows: list[Row]) -> str:
    """Time of loading one batch, and its share of a training step."""
    lines = [
        "| loader | from | batch | images/s | 10-90 % | ms per batch | share of a PGD-10 step |",
        "|---|---|---:|---:|---:|---:|---:|",
    ]

    def which(row: Row) -> Key:
        places = (row["device"], row["threads"], row["loader"], row["source"])
        return (*places, row["image_size"], row["config"]["batch_size"])

    chosen = newest_of_each([row for row in rows if row["kind"] == "loader"], which)
    for row in chosen:
        rate, batch = row["images_per_s"], str(row["config"]["batch_size"])
        spread = f"{number(rate['p10'])}-{number(rate['p90'])}"
        cells = [row["loader"], row["source"], batch, number(rate["median"]), spread]
        lines.append(_line([*cells, number(row["ms"]["median"]), f"{100 * row['of_step']:.2g} %"]))
    return _table(lines, chosen)


def savings_table(rows: list[Row]) -> str:
    """Speed-up by each saving of work, in the newest run of the script."""
    lines = [
        "| saving | method | batch | without it, ms | with it, ms | without / with | 10-90 % |",
        "|---|---|---:|---:|---:|---:|---:|",
    ]
    chosen = newest(
        [row for row in rows if row["kind"] == "saving"],
        lambda row: (row["device"], row["threads"], row["dtype"], row["config"]["batch_size"]),
    )
    for row in chosen:
        ratio, batch = row["plain_over_saving"], str(row["config"]["batch_size"])
        times = [number(row["ms"][side]["median"]) for side in ("plain", "saving")]
        spread = f"{ratio['p10']:.3f}-{ratio['p90']:.3f}"
        method = f"{row['method']} {row['dtype']}"
        lines.append(
            _line([row["saving"], method, batch, *times, f"{ratio['median']:.3f} x", spread])
        )
    return _table(lines, chosen)


def inductor_table(rows: list[Row]) -> str:
    """Speed-up by other settings of Inductor."""
    lines = [
        "| setting | method | batch | mode | ms | none / setting | 10-90 % | compile s |",
        "|---|---|---:|---|---:|---:|---:|---:|",
    ]
    chosen = newest_of_each(
        [row for row in rows if row["kind"] == "inductor"],
        lambda row: (*_where(row), row["inductor"], row["method"], row["dtype"], row["mode"]),
    )
    for row in chosen:
        ratio, batch = row["none_over_it"], str(row["config"]["batch_size"])
        spread = f"{ratio['p10']:.3f}-{ratio['p90']:.3f}"
        cells = [row["inductor"], f"{row['method']} {row['dtype']}", batch, row["mode"]]
        cells += [number(row["ms"]["median"]), f"{ratio['median']:.3f} x", spread]
        lines.append(_line([*cells, number(row["compile_s"])]))
    return _table(lines, chosen)


def recipes_table(rows: list[Row]) -> str:
    """Every recipe with its accuracy on digits after a few epochs."""
    chosen = newest_of_each([row for row in rows if row["kind"] == "digits"], _recipe)
    reached = {row["method"]: row for row in chosen if row["method"] in METHODS}
    if "standard" not in reached:
        return recipe_table()
    epochs = reached["standard"]["epochs"]
    options = {
        f"`{name}` with {key}={value:g}"
        for name, row in reached.items()
        for key, value in row["given"].items()
    }
    said = [
        f"Status: clean / PGD-20 test accuracy, %, after {epochs} epochs on digits with the "
        f"recipe's own defaults there; standard training reaches "
        f"{_accuracies(reached['standard'])}.",
        "So short a run shows that a recipe learns, not which one is best: a constant prediction",
        "has 10 / 10, and recipes that perturb weights, or use half of the images per epoch (RST),",
        "learn slowest.",
        f"Recipes that would begin too late start earlier: {', '.join(sorted(options))}."
        if options
        else "",
        "Measured by `python bench/digits.py`:",
        *dict.fromkeys(map(caption, reached.values())),
    ]
    status = {name: _accuracies(row) for name, row in reached.items()}
    return "\n".join([*filter(None, said), "", recipe_table(status)])


def _recipe(row: Row) -> Key:
    return (row["method"],)


def _accuracies(row: Row) -> str:
    return f"{100 * row['last']['clean']:.1f} / {100 * row['last']['pgd-20']:.1f}"


def _line(cells: list[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def _table(lines: list[str], shown: list[Row]) -> str:
    """The lines and the captions of the rows that are shown; empty if there are no rows."""
    return "\n".join([*lines, "", *dict.fromkeys(map(caption, shown))]) if shown else ""


def caption(row: Row) -> str:
    """The origin of a row: device, versions, commit, date and command."""
    return (
        f"{row['device']}, {row['threads']} threads, torch {row['torch']}, "
        f"Python {row['python']}, fastadv {row['fastadv']} ({row['commit']}), {row['date'][:10]}: "
        f"`{row['command']}`"
    )


def _of_cpus(table: Callable[[list[Row]], str]) -> Callable[[list[Row]], str]:
    """``table`` without the rows of GPUs, which have their own tables."""
    return lambda rows: table([row for row in rows if not is_of_gpu(row)])


TABLES: dict[str, Callable[[list[Row]], str]] = {
    "speed": _of_cpus(speed_table),
    "methods": _of_cpus(methods_table),
    "ratios": _of_cpus(ratios_table),
    "passes": _of_cpus(passes_table),
    "evaluation": lambda rows: evaluation_table(rows, caption),
    "quick": lambda rows: quick_table(rows, caption),
    "gpu": lambda rows: gpu_table(rows, caption),
    "gpu-fused": lambda rows: fused_table(rows, caption),
    "gpu-passes": lambda rows: passes_table([row for row in rows if is_of_gpu(row)]) or NONE_YET,
    "gpu-replay": lambda rows: replay_table(rows, caption),
    "gpu-kernels": kernels_table,
    "kernel-shares": shares_table,
    "gpu-training": lambda rows: training_table(rows, caption),
    "counted-launches": lambda rows: launches_table(counted_steps()),
    "counted-kinds": lambda rows: kinds_table(counted_steps()),
    "counted-bytes": lambda rows: bytes_table(counted_steps()),
    "least-bytes": lambda rows: least_bytes_table(),
    "loaders": loaders_table,
    "savings": savings_table,
    "inductor": inductor_table,
    "robust": robust_table,
    "recipes": recipes_table,
}


def written_into(text: str, rows: list[Row]) -> str:
    """``text`` with every marked table replaced; raises ``UserError`` for an unknown mark."""

    def replaced(found: re.Match[str]) -> str:
        name = found[1]
        if name not in TABLES:
            raise unknown("table", name, TABLES)
        return f"<!-- bench:{name} -->\n{TABLES[name](rows)}\n<!-- /bench:{name} -->"

    return re.sub(r"<!-- bench:([\w-]+) -->.*?<!-- /bench:\1 -->", replaced, text, flags=re.DOTALL)


def main() -> None:
    """Print the tables or write them into files."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--take", type=Path, nargs="*", default=[], help="add packed results")
    parser.add_argument("--write", type=Path, nargs="*", default=[])
    given = parser.parse_args()
    for file in given.write:
        if not file.is_file():
            parser.error(f"there is no file {file} to write tables into")
    for packed in given.take:
        print(f"{packed}: {len(take(packed, given.results))} new rows")
    # The kernels' own benchmark says "bench" for "kind".
    rows = [{"kind": "kernel speed"} | row for row in read_rows(given.results)]
    for file in given.write:
        file.write_text(written_into(file.read_text(encoding="utf-8"), rows), encoding="utf-8")
    if not given.write and not given.take:
        for name, render in TABLES.items():
            print(f"## {name}\n\n{render(rows)}\n")


if __name__ == "__main__":
    try:
        main()
    except (UserError, OSError) as error:
        sys.exit(f"error: {error}")
