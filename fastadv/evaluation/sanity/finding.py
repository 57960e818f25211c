"""What a check has found, and the report of all checks."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Finding:
    """The outcome of one check. ``sentence`` says what was counted and, if it failed, what that
    means; ``numbers`` are the counts by name. ``passed`` is None if the check says nothing about
    this network or threat."""

    check: str
    passed: bool | None
    sentence: str
    numbers: Mapping[str, Any]

    @property
    def word(self) -> str:
        """The outcome in one word."""
        return "skipped" if self.passed is None else "passed" if self.passed else "FAILED"

    @property
    def text(self) -> str:
        """The name of the check, and its sentence."""
        return f"{self.check}: {self.sentence}"

    def __str__(self) -> str:
        return f"{self.word:7} {self.text}"


@dataclass(frozen=True)
class Report:
    """The findings on ``n`` images, of which ``right`` were classified correctly without an attack
    and ``standing`` under each gradient attack; ``passes`` is the cost in forward passes per
    image, a gradient counted as three."""

    findings: tuple[Finding, ...]
    n: int
    right: int
    standing: int
    passes: float

    @property
    def passed(self) -> bool:
        """True if no check failed."""
        return not self.failed

    @property
    def failed(self) -> tuple[Finding, ...]:
        """The checks that failed."""
        return tuple(finding for finding in self.findings if finding.passed is False)

    def verdict(self) -> str:
        """The outcome in one sentence."""
        if self.passed:
            asked = sum(finding.passed is not None for finding in self.findings)
            return (
                f"passed all {asked} checks on {self.n} images: no sign that the attacks were "
                "blinded"
            )
        names = ", ".join(finding.check for finding in self.failed)
        return (
            f"failed {len(self.failed)} of {len(self.findings)} checks on {self.n} images "
            f"({names}): a robust accuracy of this network by gradient attacks means nothing"
        )

    def __str__(self) -> str:
        return "\n".join([*map(str, self.findings), self.verdict()])

    def as_json(self) -> dict[str, Any]:
        """The report in types that JSON has."""
        return {
            "passed": self.passed,
            "n": self.n,
            "right": self.right,
            "standing": self.standing,
            "passes": round(self.passes, 1),
            "checks": [
                {
                    "check": finding.check,
                    "passed": finding.passed,
                    "sentence": finding.sentence,
                    **finding.numbers,
                }
                for finding in self.findings
            ],
        }
