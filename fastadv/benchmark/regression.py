"""Two documents of ``fastadv bench`` against each other: is something slower beyond noise?"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rich.markup import escape
from rich.table import Table

from fastadv.benchmark.document import Document
from fastadv.benchmark.shift import LEVEL, THRESHOLD, Ratio, ratio_of, together
from fastadv.benchmark.table import brief_table, number
from fastadv.errors import UserError
from fastadv.exit_codes import ExitCode
from fastadv.storage.printable import printable

_OURS = ("step", "operator")  # passes alone are PyTorch's, and tell about the machine


@dataclass(frozen=True)
class Change:
    """A row in both documents. ``each`` has its own 95 % interval, ``joint`` one that holds for all
    rows together; ``counts`` is False for peers and passes, which show what the machine did."""

    name: str
    batch_size: int | None
    old_ms: float
    new_ms: float
    each: Ratio
    joint: Ratio
    turns: tuple[int, int]
    counts: bool
    verdict: str

    def as_json(self) -> dict[str, Any]:
        """For the document."""
        return {
            "name": self.name,
            "batch_size": self.batch_size,
            "old_ms": self.old_ms,
            "new_ms": self.new_ms,
            "new_over_old_ratio": _quantity(self.each, min(self.turns)),
            "joint_ratio": _quantity(self.joint, min(self.turns)),
            "counts": self.counts,
            "verdict": self.verdict,
        }


def _quantity(ratio: Ratio, n: int) -> dict[str, Any]:
    ends = [None if end is None else round(end, 4) for end in (ratio.low, ratio.high)]
    return {"value": round(ratio.value, 4), "low": ends[0], "high": ends[1], "n": n}


@dataclass(frozen=True)
class Regression:
    """All changes, what one document lacks, and what differs between the two runs."""

    changes: Sequence[Change]
    missing: Sequence[str]
    differences: Sequence[str]
    machine: Sequence[str]
    threshold: float

    @property
    def slower(self) -> list[Change]:
        """The rows of ours that are slower beyond noise."""
        return [each for each in self.changes if each.counts and each.verdict == "slower"]

    def as_json(self, old: Document) -> dict[str, Any]:
        """For the new run's document."""
        return {
            "old": {"run": old["run"], "versions": old["versions"], "machine": old["machine"]},
            "threshold_ratio": self.threshold,
            "level": LEVEL,
            "regression": bool(self.slower),
            "changes": [each.as_json() for each in self.changes],
            "missing": list(self.missing),
            "differences": list(self.differences),
        }


def regression(old: Document, new: Document, threshold: float = THRESHOLD) -> Regression:
    """Compare the times of every row that both have. Raises ``UserError`` if they share none."""
    before, after = dict(_timed(old)), dict(_timed(new))
    shared = [key for key in before if key in after]
    if not shared:
        raise UserError(
            "The two benchmarks have no row in common: measure the second one with --compare."
        )
    level = together(LEVEL, sum(_counts(before[key]) for key in shared))
    changes = [_change(before[key], after[key], level, threshold) for key in shared]
    missing = [
        f"{entry['name']} is only in the {which} benchmark"
        for which, mine, other in (("old", before, after), ("new", after, before))
        for key, entry in mine.items()
        if key not in other
    ]
    return Regression(changes, missing, _differences(old, new), _machine(old, new), threshold)


def _timed(found: Document) -> Iterator[tuple[str, Mapping[str, Any]]]:
    for entry in found["measurements"]:
        if entry.get("turns_ms") and all(taken > 0 for taken in entry["turns_ms"]):
            names = [entry.get(name) for name in ("kind", "name", "setting", "size", "backend")]
            yield json.dumps(names, sort_keys=True), entry


def _counts(entry: Mapping[str, Any]) -> bool:
    return entry["kind"] in _OURS and entry.get("by") == "fastadv"


def _change(
    old: Mapping[str, Any], new: Mapping[str, Any], level: float, threshold: float
) -> Change:
    before, after = old["turns_ms"], new["turns_ms"]
    joint = ratio_of(after, before, level)
    verdict = ""
    if joint.low is None or joint.high is None:
        verdict = "too few turns"
    elif joint.low > threshold:
        verdict = "slower"
    elif joint.high < 1 / threshold:
        verdict = "faster"
    setting = old.get("setting") or {}
    is_step = "operator" not in old
    return Change(
        old["name"],
        setting.get("batch_size") if is_step else None,
        old["measured"]["time_ms"]["value"],
        new["measured"]["time_ms"]["value"],
        ratio_of(after, before),
        joint,
        (len(before), len(after)),
        _counts(old),
        verdict,
    )


def _differences(old: Document, new: Document) -> list[str]:
    found = []
    if old["machine"]["device"] != new["machine"]["device"]:
        found.append(
            f"The devices differ ({old['machine']['device']}, then {new['machine']['device']}): "
            "the ratios compare machines too."
        )
    pairs = [
        ("threads", old["machine"]["threads"], new["machine"]["threads"]),
        *((name, old["versions"][name], new["versions"][name]) for name in old["versions"]),
    ]
    told = [f"{name} {was}, then {now}" for name, was, now in pairs if was != now]
    return [*found, *([f"What differs: {'; '.join(told)}."] if told else [])]


def _machine(old: Document, new: Document) -> list[str]:
    """How much faster the device itself was, by what no code of ours takes part in."""
    found = []
    for was in old["measurements"]:
        for now in new["measurements"]:
            if was["kind"] == now["kind"] == "limits" and was["name"] == now["name"]:
                rates = [
                    f"{word} {_rate(now, key) / _rate(was, key):.2f} times as fast"
                    for word, key in (
                        ("copies", "copy_gb_per_s"),
                        ("matrix products", "matmul_tflop_per_s"),
                    )
                    if _rate(was, key)
                ]
                found.append(f"{now['name']}: {', '.join(rates)}")
    return list(dict.fromkeys(found))


def _rate(entry: Mapping[str, Any], key: str) -> float:
    return float(entry["measured"].get(key, {}).get("value", 0.0))


def change_table(found: Regression) -> Table:
    """Every row that both runs have; peers and passes last."""
    ordered = sorted(found.changes, key=lambda change: not change.counts)
    several = len({each.batch_size for each in ordered if each.batch_size}) > 1
    table = brief_table(
        f"times of the new run over the old, {100 * LEVEL:.0f} % intervals",
        "row",
        ("old ms", "new ms", "ratio", "interval", ""),
    )
    for each in ordered:
        name = each.name.removeprefix("fastadv ")
        name += f", batch {each.batch_size}" if several and each.batch_size else ""
        ends = "" if each.each.low is None else f"{each.each.low:.3f}-{each.each.high:.3f}"
        colour = {"slower": "red", "faster": "green"}.get(each.verdict, "")
        verdict = each.verdict if each.counts or each.verdict == "too few turns" else ""
        table.add_row(
            escape(printable(name)),
            number(each.old_ms),
            number(each.new_ms),
            f"{each.each.value:.3f}",
            ends,
            f"[{colour}]{verdict}[/]" if verdict and colour else verdict,
        )
    return table


def sentences(found: Regression) -> Iterator[str]:
    """What the table does not say, ending with the verdict."""
    yield from found.differences
    if found.machine:
        yield f"The machine itself, new over old: {'; '.join(found.machine)}."
    yield from (f"{sentence}." for sentence in found.missing)
    yield (
        "The intervals cover the spread of the turns in both runs, not a machine that was in "
        "another state during one of them."
    )
    without = [each for each in found.changes if each.counts and each.joint.low is None]
    if without:
        yield (
            f"{len(without)} rows have too few turns for an interval and prove nothing: measure "
            "both with more --repeats (9 by default)."
        )
    slower = found.slower
    limit = f"{found.threshold:g}"
    if slower:
        yield (
            f"Slower: {', '.join(each.name.removeprefix('fastadv ') for each in slower)} (the "
            f"interval that holds for all rows together is above {limit}). Exit code "
            f"{ExitCode.DOUBT}."
        )
    else:
        yield f"No row is slower beyond noise (no whole interval above {limit})."
