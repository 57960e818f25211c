"""A replacement of pytest-benchmark's fixture, for machines without the package.

It provides what ``bench/kernels.py`` uses: ``benchmark(call)`` and
``benchmark.stats.stats.median``.
"""

import statistics
import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest

SECONDS = 0.1


class Benchmark:
    """Calls a function repeatedly for a tenth of a second and stores the median time."""

    def __init__(self) -> None:
        self.stats = SimpleNamespace(stats=SimpleNamespace(median=float("nan")))

    def __call__(self, call: Callable[[], Any]) -> None:
        times: list[float] = []
        until = time.perf_counter() + SECONDS
        while len(times) < 3 or time.perf_counter() < until:
            began = time.perf_counter()
            call()
            times.append(time.perf_counter() - began)
        self.stats.stats.median = statistics.median(times)


@pytest.fixture
def benchmark() -> Benchmark:
    return Benchmark()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--benchmark-only", action="store_true")
