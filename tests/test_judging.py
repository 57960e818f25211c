"""The commands of docs/judging-a-model.md print what the page shows, with other numbers."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from fastadv.evaluation.attacks.inputs import attacked_network
from fastadv.evaluation.attacks.names import OPTIONS, parse_attack
from fastadv.evaluation.attacks.searched import stages_of
from fastadv.evaluation.paired import Paired
from fastadv.evaluation.search import cascade
from fastadv.evaluation.search.cascade import entering
from fastadv.evaluation.search.catalogue import CASCADES
from fastadv.evaluation.search.passes import Passes
from fastadv.evaluation.search.quick import RUNS
from fastadv.evaluation.search.rows import joined
from fastadv.evaluation.search.search import Images
from fastadv.evaluation.verdicts import Verdicts
from fastadv.threat import Threat

PAGE = (Path(__file__).parents[1] / "docs" / "judging-a-model.md").read_text(encoding="utf-8")
SECTION = PAGE.partition("\n## Protocol and comparison\n")[2].partition("\n## ")[0]


def commands() -> Iterator[tuple[list[str], str]]:
    """The words of each command of the section, and what is printed below it."""
    for block in re.findall(r"(?ms)^```console\n(.*?)^```", SECTION):
        for command in re.split(r"(?m)^\$ fastadv ", block)[1:]:
            line, _, shown = command.partition("\n")
            yield line.split(), shown


def shape(text: str) -> str:
    """``text`` without what depends on the machine: numbers, who is higher, whether it is told."""
    text = re.sub(r"[━┃┏┓┗┛┡┩┳┻╇│├┤┼─└┘┴]+", " ", text)
    text = " ".join(text.split())
    text = re.sub(r"A difference of these two networks\..*?evaluate RUN\.\.\. ?", "", text)
    text = re.sub(r"-?\d[\d,]*\.\d+|(?<![\w-])\d[\d,]*(?![\w{])", "#", text)
    text = re.sub(
        r"no difference can be told from these images(; about # images [a-z ]+)?", "T", text
    )
    text = re.sub(r": a difference", ": T", text)
    text = re.sub(r"p [<=] #", "p", text)
    return re.sub(r"runs/[\w-]+ is # points higher", "RUN is # points higher", text).strip()


@pytest.mark.slow
def test_the_commands_print_what_the_page_shows(fastadv_command: Any) -> None:
    ran = 0
    for words, shown in commands():
        outcome = fastadv_command(*words)
        assert outcome.code == 0, outcome.err
        if words[0] != "train":
            assert shape(outcome.out) == shape(shown), words
        ran += 1
    assert ran == 7


def test_the_shape_of_an_output_keeps_its_words() -> None:
    first = "pgd-20, best: runs/a 1.5 %; runs/a is 1.20 points higher (p = 0.02): a difference"
    second = "pgd-20, best: runs/a 22.5 %; runs/b is 0.20 points higher (p < 0.001): no difference"
    second += " can be told from these images; about 50,000 images would be needed"
    assert shape(first) == shape(second)
    assert shape(first) != shape(first.replace("higher", "lower"))
    assert shape(first) != shape(first.replace("pgd-20", "pgd-10"))


def test_its_example_of_ten_thousand_images() -> None:
    space: dict[str, Any] = {}
    (block,) = re.findall(r"(?ms)^<!-- runs -->\n```python\n(.*?)^```", SECTION)
    exec(compile(block, "judging-a-model.md", "exec"), space)
    shown = " ".join(SECTION.split())
    for name in ("alike", "apart"):
        assert space[name] in shown
    assert Paired(3000, 2300, 2200, 2500).n == 10_000


def test_numpy_reads_a_file_of_verdicts_as_the_page_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    facts = {"attack": "autoattack", "norm": "linf", "eps": 0.1, "seed": 0}
    facts |= {"weights": "w", "images": "i"}
    fooled_by = np.array([-1, 0, 2, 2], np.int16)
    Verdicts.collected(
        {
            "index": [0, 1, 2, 3],
            "label": [0, 0, 1, 1],
            "right": fooled_by < 0,
            "margin": [1.0, -1.0, 0.0, 0.0],
            "fooled_by": fooled_by,
        },
        ["clean", "apgd-ce", "square"],
        facts,
    ).write(tmp_path / "verdicts.npz")
    monkeypatch.chdir(tmp_path)
    block = re.findall(r"(?ms)^```python\n(import json.*?)^```", SECTION)[0]
    space: dict[str, Any] = {}
    exec(compile(block, "judging-a-model.md", "exec"), space)
    assert space["fooled"] == {"clean": 1, "apgd-ce": 0, "square": 2}
    assert space["facts"] == facts
    rows = re.findall(r"(?m)^\| `(\w+)` \| (\w+) ", SECTION)
    with np.load(tmp_path / "verdicts.npz") as file:
        assert [name for name, _ in rows] == list(file.files)
        for name, kind in rows:
            assert file[name].dtype.kind == "U" if kind == "str" else file[name].dtype == kind


def attack_rows() -> list[list[str]]:
    table = PAGE.partition("<!-- attacks -->")[2].partition("<!-- /attacks -->")[0]
    rows = [re.split(r"(?<!\\)\|", line)[1:-1] for line in table.strip().splitlines()[2:]]
    return [[cell.strip() for cell in row] for row in rows]


def test_the_table_of_attacks_has_every_name() -> None:
    listed = {row[0].strip("`") for row in attack_rows()}
    kinds = {parse_attack(name).kind for name in listed if name not in CASCADES}
    assert kinds == set(OPTIONS) - {"cascade"}
    assert set(CASCADES) <= listed
    for name, cascade_of in CASCADES.items():
        (row,) = (row for row in attack_rows() if row[0] == f"`{name}`")
        assert f"`{cascade_of}`" in row[2]


@pytest.mark.parametrize("row", attack_rows(), ids=lambda row: row[0].strip("`"))
def test_the_table_of_attacks_counts_their_passes(row: list[str]) -> None:
    """On a linear network whose images stay robust."""
    spec = parse_attack(row[0].strip("`"))
    if not spec.searches or any(part.kind == "square" for part in spec.searches):
        return  # no searches; or 5,000 queries, of which some are not asked
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(27, 10))
    x = torch.rand(2, 3, 3, 3)
    logits = model(x).detach()
    net = attacked_network(model, torch.device("cpu"), False, None)
    images = Images(x, logits.argmax(1), torch.arange(2), logits)
    stages = stages_of(spec, Threat("linf", 1e-6), 0, 10, again=False)
    with Passes(net, repeats=spec.repeats) as passes:
        rows = entering(images, images.index, targeted=False)
        found = joined(cascade.run(stages, iter([rows]), passes, 2))
    assert not found["fooled"].any()
    counted = (passes.forwards // 2, passes.backwards // 2)
    least = tuple(int(cell.split(" to ")[0].replace(",", "")) for cell in row[4:])
    assert counted == least


def test_the_longest_quick_attack_is_that_of_the_table() -> None:
    (row,) = (row for row in attack_rows() if row[0] == "`quick`")
    steps, runs = sum(run.steps for run in RUNS), len(RUNS)
    assert [row[4].split(" to ")[1], row[5].split(" to ")[1]] == [str(steps + runs), str(steps)]
    assert row[2].startswith(f"{runs} runs of ")
    assert {run.steps for run in RUNS} == {10, 20}
