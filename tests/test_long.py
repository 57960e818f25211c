"""CI does not run the third tier; the committed row of its last run covers all its tests."""

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
    last = json.loads(LONG.read_text().splitlines()[-1])
    assert {test.partition("[")[0] for test in last["passed"]} == marked
    assert not last["failed"] + last["error"] + last["skipped"]
