"""A benchmark as one JSON document, whose form ``bench.schema.json`` says.

The document is made from the rows that go to the results file: their origin is said once, and each
measured number is a quantity under a name that ends in its unit: value, 95 % interval (null where
too few turns have none) and the number of values it comes from.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from fastadv.benchmark.asked import Asked
from fastadv.benchmark.rows import Row
from fastadv.errors import UserError
from fastadv.storage.printable import printable

FORMAT, VERSION = "fastadv-bench", 1
Document = dict[str, Any]
Quantity = dict[str, Any]

# What identifies a row and says how it was measured; the rest of a row is numbers.
_SAID = (
    *("by", "method", "dtype", "mode", "attack_bn", "layout", "fused_norm", "tf32", "version"),
    *("pass", "operator", "backend", "size", "peer", "ours", "without", "peer_bn", "our_bn"),
    *("parity", "candidate"),
)


def document(
    rows: Sequence[Row], asked: Asked, skipped: Sequence[str], *, complete: bool
) -> Document:
    """The document of one run from its rows; ``complete`` is False if it was interrupted."""
    origin: Mapping[str, Any] = rows[0] if rows else {}
    measured = [row for row in rows if row["kind"] in _NUMBERS]
    return {
        "format": FORMAT,
        "version": VERSION,
        "complete": complete,
        "run": {name: origin.get(name) for name in ("run", "date", "command")},
        "machine": {
            "device": origin.get("device"),
            "device_type": asked.device_type,
            "cores": os.cpu_count(),
            "threads": asked.threads,
            "load_1min": origin.get("load"),
            "platform": sys.platform,
        },
        "versions": {
            **{n: origin.get(n) for n in ("fastadv", "commit", "torch", "triton", "cuda")},
            "cudnn": torch.backends.cudnn.version() if asked.device_type == "cuda" else None,
            "python": origin.get("python"),
        },
        "settings": asked.as_json(),
        "measurements": [_measurement(row) for row in measured],
        "skipped": list(skipped),
    }


def _measurement(row: Row) -> dict[str, Any]:
    config = row.get("config")
    found: dict[str, Any] = {
        "kind": row["kind"].replace(" ", "-"),
        "name": row.get("name") or row.get("ours") or row.get("dtype"),
        **{name: row[name] for name in _SAID if name in row},
    }
    if config is not None:
        found["setting"] = dict(config)
    found["interleaved"] = not row.get("alone", False)
    if "turns_ms" in row:
        found["turns_ms"] = row["turns_ms"]
    quantities = _NUMBERS[row["kind"]](row)
    found["measured"] = {
        name: quantity
        for name, quantity in quantities.items()
        if quantity is not None and math.isfinite(quantity["value"])
    }
    counted = {"work_gflop": row.get("gflop")}
    counted |= {f"{k.replace(' ', '_')}_passes": n for k, n in row.get("passes", {}).items()}
    counted |= {"launches": row.get("count")} if row["kind"] in ("kernel", "kernels") else {}
    found["counted"] = {name: count for name, count in counted.items() if count is not None}
    return found


def _spread(row: Mapping[str, Any] | None) -> Quantity | None:
    """The quantity of a ``Spread`` in a row."""
    if not row:
        return None
    low, high = row.get("low95"), row.get("high95")
    return {"value": row["median"], "low": low, "high": high, "n": row["count"]}


def _alone(value: float | None, n: int = 1) -> Quantity | None:
    """A quantity without an interval."""
    return None if value is None else {"value": value, "low": None, "high": None, "n": n}


def _as_time(value: float | None, row: Row, *, inverse: bool = False) -> Quantity | None:
    """A quantity that is proportional to the row's time, or to its inverse: with its interval."""
    if value is None:
        return None
    ms = row["ms"]
    low, high = ms.get("low95"), ms.get("high95")
    if low is None or high is None or not ms["median"]:
        return _alone(value, ms["count"])
    factors = sorted(
        (ms["median"] / each if inverse else each / ms["median"]) for each in (low, high)
    )
    ends = [float(f"{value * factor:.4g}") for factor in factors]
    return {"value": value, "low": ends[0], "high": ends[1], "n": ms["count"]}


def _limits(row: Row) -> dict[str, Quantity | None]:
    found = {}
    for name, key, unit in (
        ("copy", "copy_gb_per_s", 1e-9),
        ("matmul", "matmul_tflop_per_s", 1e-12),
    ):
        spread = row.get("spread", {}).get(name)
        low, high = (spread or {}).get("low95"), (spread or {}).get("high95")
        found[key] = {
            "value": row[key],
            "low": None if low is None else float(f"{low * unit:.4g}"),
            "high": None if high is None else float(f"{high * unit:.4g}"),
            "n": spread["count"] if spread else 1,
        }
    return found  # type: ignore[return-value]


def _step(row: Row) -> dict[str, Quantity | None]:
    return {
        "time_ms": _spread(row["ms"]),
        "rate_images_per_s": _as_time(row["images_per_s"], row, inverse=True),
        "compile_s": _alone(row.get("compile_s")),
        "peak_mib": _alone(row.get("peak_mib")),
        "work_tflop_per_s": _as_time(row.get("tflop_per_s"), row, inverse=True),
        "of_matmul_ratio": _as_time(row.get("of_matmul"), row, inverse=True),
        "of_copy_ratio": _as_time(row.get("of_copy"), row, inverse=True),
        "bound_ms": _alone(row.get("bound_ms"), 5),
        "over_bound_ratio": _as_time(row.get("over_bound"), row),
        "passes_ms": _spread(row.get("passes_ms")),
        "over_passes_ratio": _spread(row.get("over_passes")),
        "idle_ratio": _alone(row.get("idle_share")),
    }


def _fused(row: Row) -> dict[str, Quantity | None]:
    return {
        "own_ms": _spread(row["ms"]["own"]),
        "pytorch_ms": _spread(row["ms"]["pytorch"]),
        "faster_ratio": _spread(row["times"]),
    }


_NUMBERS = {
    "limits": _limits,
    "step": _step,
    "pass": _step,
    "operator": lambda row: {"time_ms": _spread(row["ms"])},
    "speedup": lambda row: {"faster_ratio": _spread(row["times"])},
    "fused norm": _fused,
    "kernels": lambda row: {
        "wall_us": _alone(row["wall_us"], 5),
        "kernel_us": _alone(row["kernel_us"]),
        "span_us": _alone(row["span_us"]),
        "idle_ratio": _alone(row["idle_share"]),
    },
    "kernel": lambda row: {
        "time_us": _alone(row["us"]),
        "moved_bytes": _alone(row["bytes"]),
        "of_copy_ratio": _alone(row["of_copy"]),
    },
}


@dataclass
class Target:
    """Where a document goes: a file, or standard output for ``-``."""

    name: str

    @property
    def is_stdout(self) -> bool:
        return self.name == "-"

    def require_writable(self) -> None:
        """Raise ``UserError`` now, not after minutes of timing, if the file cannot be written."""
        if self.is_stdout:
            return
        path = Path(self.name)
        if path.is_dir():
            raise UserError(f"--json takes a file, and {printable(path)} is a folder.")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            tempfile.TemporaryFile(dir=path.parent).close()
        except OSError as error:
            raise self._refused(error) from None

    def write(self, found: Document) -> None:
        """Write the document; a file is replaced as a whole."""
        text = json.dumps(found, indent=1, allow_nan=False) + "\n"
        if self.is_stdout:
            sys.stdout.write(text)
            sys.stdout.flush()
            return
        path = Path(self.name)
        fresh = path.with_name(f"{path.name}.{os.getpid()}.partial")
        try:
            fresh.write_text(text, encoding="utf-8")
            fresh.replace(path)
        except OSError as error:
            with contextlib.suppress(OSError):
                fresh.unlink()
            raise self._refused(error) from None

    def _refused(self, error: OSError) -> UserError:
        return UserError(
            f"Cannot write {printable(self.name)}: {error.strerror}; give --json another file."
        )


def read_document(name: str, look: Callable[[Document], object]) -> Document:
    """The document in a file of ``--json``; raises ``UserError`` if there is none. ``look`` reads
    all that will be read of it later; what it raises is due to an edited file."""
    shown = printable(name)
    try:
        found = json.loads(Path(name).read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"Cannot read {shown}: {error.strerror}.") from None
    except ValueError:
        raise UserError(f"{shown} is not JSON; it must come from `fastadv bench --json`.") from None
    if not isinstance(found, dict) or found.get("format") != FORMAT:
        raise UserError(f"{shown} is no benchmark; write one with `fastadv bench --json FILE`.")
    if found.get("version") != VERSION:
        raise UserError(
            f"{shown} has version {found.get('version')} of the schema and this fastadv reads "
            f"{VERSION}; measure it again with `fastadv bench --json FILE`."
        )
    try:
        Asked.from_json(found["settings"])
        look(found)
    except UserError:
        raise
    except (KeyError, TypeError, ValueError, AttributeError, ArithmeticError):
        raise UserError(
            f"{shown} was edited or damaged; measure it again with `fastadv bench --json FILE`."
        ) from None
    return found
