"""CI does not run the third tier; the committed rows say that each of its tests passed when it was
run last."""

import json
import re
from pathlib import Path

from conftest import LONG

TESTS = Path(__file__).parent
MARKED = re.compile(r"^@pytest\.mark\.long\n(?:.*\n)*?def (\w+)", re.MULTILINE)


def test_every_long_test_passed_in_its_last_run() -> None:
    marked = {
        f"tests/{file.relative_to(TESTS).as_posix()}::{name}"
        for file in TESTS.rglob("test_*.py")
        for name in MARKED.findall(file.read_text())
    }
    assert marked
    last: dict[str, str] = {}
    for row in map(json.loads, LONG.read_text().splitlines()):
        for state in ("passed", "failed", "error", "skipped"):
            last |= dict.fromkeys(row[state], state)
    names = {test.partition("[")[0] for test in last}
    assert marked <= names
    assert {test for test, state in last.items() if state != "passed"} == set()
