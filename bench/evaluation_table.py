"""The table of evaluations beside other programs, from rows of ``evaluation.py``, and that of the
attack that chooses epochs, from rows of ``quick_attack.py``."""

from collections.abc import Callable
from typing import Any

from fastadv.benchmark.rows import newest_of_each
from fastadv.benchmark.table import number

Row = dict[str, Any]
NONE_YET = "No run has been measured yet."


def evaluation_table(rows: list[Row], caption: Callable[[Row], str]) -> str:
    """Seconds and accuracy of each program, by attack and network."""
    chosen = newest_of_each([row for row in rows if row["kind"] == "evaluation"], _where)
    lines = [
        "| attack, network | program | rounds | seconds | faster by | accuracy |",
        "|---|---|---:|---:|---:|---:|",
    ]
    for row in chosen:
        network = row["network"]
        size = {"digits": "1x8x8", "npz": "3x32x32"}.get(network["data"], network["data"])
        said = f"{row['attack']}, width {network['width']}, {row['n']} images {size}"
        if row["cuda"]:
            said += f", {row['device']}"
        faster = f"{row['faster']['median']:.2f}x" if "faster" in row else ""
        cells = [
            said,
            row["name"],
            str(row["seconds"]["count"]),
            number(row["seconds"]["median"]),
            faster,
            f"{100 * row['accuracy']:.1f} %",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    if not chosen:
        return NONE_YET
    return "\n".join([*lines, "", *dict.fromkeys(map(caption, chosen))])


def quick_table(rows: list[Row], caption: Callable[[Row], str]) -> str:
    """Accuracy under ``quick`` beside AutoAttack's, and the passes of both, by network."""
    chosen = newest_of_each([row for row in rows if row["kind"] == "quick attack"], _network)
    lines = [
        "| trained with | data | width | images | clean, % | AutoAttack, % | quick, % | difference "
        "| passes of quick | of AutoAttack |",
        "|---|---|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for row in chosen:
        network = row["network"]
        names = ("clean", "autoattack", "accuracy", "difference")
        # Without a step the images of FGSM's variants have their random start alone.
        noise = ", noise alone" if network.get("alpha") == 0 else ""
        cells = [
            network["method"] + noise,
            network["data"],
            str(network["width"]),
            str(row["n"]),
            *(f"{100 * row[name]:.1f}" for name in names),
            *(_both(row[name]) for name in ("passes", "autoattack_passes")),
        ]
        lines.append("| " + " | ".join(cells) + " |")
    if not chosen:
        return NONE_YET
    return "\n".join([*lines, "", *dict.fromkeys(map(caption, chosen))])


def _both(passes: list[float]) -> str:
    return " + ".join(f"{number(count)}" for count in passes)


def _network(row: Row) -> tuple[Any, ...]:
    return (*row["network"].values(), row["n"], row["attack"])


def _where(row: Row) -> tuple[Any, ...]:
    network = row["network"]
    return (row["device"], row["threads"], row["attack"], *network.values(), row["n"], row["name"])
