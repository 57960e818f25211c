"""The record of the pretended CUDA runtime belongs to the present files."""

from __future__ import annotations

import json
import shutil
import sys
import tomllib
from pathlib import Path

import pytest

TOOL = Path(__file__).resolve().parents[1] / "tools" / "pretend_cuda"
sys.path.insert(0, str(TOOL))

import digest  # noqa: E402
import records  # noqa: E402


def test_nothing_has_changed_since_it_was_recorded() -> None:
    found = records.complaints()
    assert not found, "\n".join(found)


def test_every_golden_number_is_of_a_recorded_run() -> None:
    """A golden file that was edited by hand has no reason in the record."""
    known = records.read()
    for section in records.GOLDEN:
        counts = known.get(section, {}).get("counts", {})
        recorded = counts.get("passed", 0) + counts.get("refused", 0)
        assert len(records.read_golden(section)) == recorded, section


def test_a_change_is_detected_a_waiver_is_for_one_digest_and_failures_are_reported() -> None:
    entry = {"date": "2026-01-01", "counts": {"failed": 0}}
    record = {name: {**entry, "digest": digest.digest(name)} for name in digest.COVERED}
    assert records.complaints(record, []) == []
    record["shapes"] = {**entry, "digest": "0" * 16}
    (told,) = records.complaints(record, [])
    assert "run.py shapes" in told
    assert digest.digest("shapes") in told
    waiver = {"section": "shapes", "digest": digest.digest("shapes"), "reason": "a word"}
    assert records.complaints(record, [waiver]) == []
    assert len(records.complaints(record, [{**waiver, "digest": "1" * 16}])) == 1
    assert len(records.complaints(record, [{**waiver, "reason": ""}])) == 1
    # What is printed can be pasted.
    pasted = tomllib.loads(told[told.index("[[waiver]]") :])["waiver"]
    assert pasted == [{**waiver, "reason": ""}]
    record["shapes"] = {**record["tests"], "digest": waiver["digest"], "counts": {"failed": 2}}
    for waivers in ([], [waiver]):
        (told,) = records.complaints(record, waivers)
        assert "2 failures" in told
    del record["shapes"]
    (told,) = records.complaints(record, [waiver])
    assert "never been recorded" in told


CODE = '''"""A word."""

def f(x: int) -> str:
    """Another."""
    return f"{x!r:>3}" if x else "y"
'''


def test_only_code_changes_the_digest() -> None:
    told = digest.tree(CODE)
    assert told == digest.tree(CODE.replace("A word", "B").replace("Another", "Two words"))
    assert told == digest.tree(CODE.replace("    return", "    # why\n\n    return"))
    for old, new in (("if x", "if not x"), ('"y"', '"z"'), ("!r", "!s"), ("int", "bool")):
        assert told != digest.tree(CODE.replace(old, new))


def test_comments_in_c_do_not_change_the_digest(tmp_path: Path) -> None:
    texts = ['int a = 1; // one\nauto b = "// no";', 'int a =  1;\n/* b */ auto b = "// no";']
    texts.append('int a = 1; auto b = "// yes";')
    told = []
    for number, text in enumerate(texts):
        file = tmp_path / f"{number}.cpp"
        file.write_text(text)
        told.append(digest.content(file))
    assert told[0] == told[1] != told[2]


def test_a_pattern_without_files_is_an_error(tmp_path: Path) -> None:
    shutil.copytree(digest.ROOT / "fastadv" / "kernels", tmp_path / "fastadv" / "kernels")
    with pytest.raises(ValueError, match="correct the pattern in digest"):
        digest.digest("generated", tmp_path)


def test_differences_give_their_place() -> None:
    old = {"pgd": {"graphs": [{"nodes": 3}, {"nodes": 4}]}, "fast": {"graphs": []}}
    new = json.loads(json.dumps(old))
    assert records.differences(old, new) == []
    new["pgd"]["graphs"][1]["nodes"] = 5
    del new["fast"]
    assert records.differences(old, new) == [
        "pgd, graphs, number 1, nodes: 4 -> 5",
        'fast: {"graphs": []} -> nothing',
    ]
