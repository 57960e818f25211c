"""Tables of counted launches and bytes, from the golden numbers of ``tools/pretend_cuda/steps.py``.

No device has timed anything in them.
"""

import json
from collections import Counter
from pathlib import Path
from typing import Any

from fastadv.algorithms.contract.passes import INPUT_GRADIENT
from fastadv.benchmark.geometry import geometry
from fastadv.benchmark.setting import Setting
from fastadv.benchmark.traffic import MOVED

GOLDEN = Path(__file__).parents[1] / "tools" / "pretend_cuda" / "golden" / "steps.json"
NONE_YET = "Nothing has been counted yet: run `python tools/pretend_cuda/run.py steps`."
KINDS_OF = ("pgd at 512", "pgd:fused_norm=on at 512")
BATCH, ELEMENT = 512, 2  # images, and bytes of a number (bf16), in the model of the bytes

Steps = dict[str, Any]


def counted_steps() -> Steps:
    """The golden numbers; {} if there are none."""
    return json.loads(GOLDEN.read_text(encoding="utf-8")) if GOLDEN.exists() else {}


def launches_table(steps: Steps) -> str:
    """Launches and nodes of each step."""
    lines = [
        "| step | launches | nodes together | passes | optimizer | end |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for name, step in steps.items():
        launched = step.get("step") or step["replayed step"]
        graphs = step.get("graphs", {})
        nodes = [graphs[part]["nodes"] for part in ("passes", "optimizer", "end") if graphs]
        cells = [sum(nodes), *nodes] if nodes else [""] * 4
        lines.append(_line([name, launched["launches"], *cells]))
    return _table(lines)


def kinds_table(steps: Steps) -> str:
    """Launches of an eager and nodes of a captured step by kind of kernel."""
    shown = {name: _kinds(step) for name, step in steps.items() if name.startswith(KINDS_OF)}
    kinds = sorted(Counter(kind for each in shown.values() for kind in each))
    lines = [_line(["kernels", *shown]), "|---" + "|---:" * len(shown) + "|"]
    lines += [_line([kind, *(each[kind] for each in shown.values())]) for kind in kinds]
    lines.append(_line(["together", *(sum(each.values()) for each in shown.values())]))
    return _table(lines) if shown else NONE_YET


def bytes_table(steps: Steps) -> str:
    """Bytes outside convolutions and matrix products of each pass of the captured steps."""
    lines = [
        "| step | pass | runs | generated launches | of them tiny | GB | own launches | GB "
        "| GB together |",
        "|---|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for name, step in steps.items():
        for each in step.get("passes", []):
            counts = [each[key] for key in ("runs", "launches", "tiny")]
            cells = [name.replace(" captured", ""), each["pass"], *counts, _gb(each["megabytes"])]
            cells += [each["own_launches"], _gb(each["own_megabytes"])]
            lines.append(_line([*cells, _gb(each["megabytes"] + each["own_megabytes"])]))
    return _table(lines)


def least_bytes_table() -> str:
    """The model of ``traffic.py`` for an attack pass of PreActResNet-18, by kind of work."""
    setting = Setting()
    network = geometry(setting.make_model(), setting.image_shape)
    moved = {bn: network.bytes_by_work(INPUT_GRADIENT, bn, ELEMENT) for bn in ("train", "eval")}
    lines = [
        "| work | elements per image | tensors in train mode | GB | in eval mode | GB |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for work in MOVED:
        if work in network.moved:
            cells = [work, f"{network.moved[work]:,}"]
            for bn, by_work in moved.items():
                forward, backward = MOVED[work][bn]
                cells += [f"{forward}, {backward}", _gb(BATCH * by_work[work] / 1e6)]
            lines.append(_line(cells))
    whole = {bn: _gb(BATCH * sum(by_work.values()) / 1e6) for bn, by_work in moved.items()}
    return "\n".join([*lines, _line(["together", "", "", whole["train"], "", whole["eval"]])])


def _kinds(step: Any) -> Counter[str]:
    """By kind: an eager step, or the nodes of all graphs and the launches of a replay."""
    if "step" in step:
        return Counter(step["step"]["kinds"])
    counted = [*step["graphs"].values(), step["replayed step"]]
    return sum((Counter(each["kinds"]) for each in counted), Counter())


def _gb(megabytes: float) -> str:
    return f"{megabytes / 1e3:.2f}"


def _line(cells: list[Any]) -> str:
    return f"| {' | '.join(map(str, cells))} |"


def _table(lines: list[str]) -> str:
    return "\n".join(lines) if len(lines) > 2 else NONE_YET
