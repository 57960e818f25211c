"""Switches off what numbers decide, for the pretended CUDA runtime computes none.

Importable (``switch_off()``) and a pytest plugin (``-p numbers_off``). Everything else stays what
it is: shapes, types, launches, what waits, what a capture forbids. Each patch below says why it is
there; a value that is read from the device is still read, so that the wait is still made.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from fastadv import ranges
from fastadv.engine.model import agreement, bn_momentum
from fastadv.engine.optimizer.faults import Faults
from fastadv.engine.optimizer.updater import Updater
from fastadv.evaluation.tally import Tally
from fastadv.training.training_step import Step
from fastadv.training.unmoved import UnmovedCounter

TESTS = Path(__file__).resolve().parents[2] / "tests"

# Tests that compare numbers by ``==`` or by a limit of their own, so that no patch of a function
# can let them pass: they run up to there, and the AssertionError of that line is what is expected.
COMPARE = {
    "test_evaluation_on_the_gpu_is_the_one_on_the_cpu": "two evaluations are compared by ==",
    "test_weights_come_back_exactly": "weights must differ from those before they were perturbed",
}

_SOLVERS = torch.library.Library("aten", "IMPL")  # what is registered goes with it
_answer = [True]  # what reading a boolean of the device gives


def switch_off() -> None:
    """Patch the engine and torch, once in a process."""
    _patch_reads()
    _patch_words()
    _patch_solvers()
    _patch_looks()
    _patch_reactions()


def _patch_reads() -> None:
    """A boolean on the device says yes: "finite", "equal", "all of them". It is read all the same:
    what waits for the device still does, and a capture still breaks on it."""
    read = torch.Tensor.__bool__
    item, tolist = torch.Tensor.item, torch.Tensor.tolist
    equal = torch.equal

    def boolean(self: torch.Tensor) -> bool:
        value = read(self)
        return _answer[0] if self.is_cuda else value

    def one(self: torch.Tensor) -> Any:
        value = item(self)
        return _answer[0] if self.is_cuda and self.dtype == torch.bool else value

    def several(self: torch.Tensor) -> Any:
        value = tolist(self)
        # Counts, such as of right answers, are sums that the device has not made.
        counts = self.is_cuda and not self.dtype.is_floating_point
        return torch.zeros(self.shape, dtype=self.dtype).tolist() if counts else value

    def same(first: torch.Tensor, second: torch.Tensor) -> bool:
        value = equal(first, second)
        # A test that brings both to the host still compares what the device has not computed.
        asked_by = Path(sys._getframe(1).f_code.co_filename)
        return value or first.is_cuda or TESTS in asked_by.parents

    _set(torch.Tensor, "__bool__", boolean)
    _set(torch.Tensor, "item", one)
    _set(torch.Tensor, "tolist", several)
    _set(torch, "equal", same)
    _set(torch.testing, "assert_close", lambda *values, **options: None)


def _patch_words() -> None:
    """A tensor on the device is told by its shape: printing its numbers looks for finite ones, and
    allocates for as many as the device's untouched memory says."""
    words = torch.Tensor.__repr__

    def told(self: torch.Tensor, **options: Any) -> str:
        if not self.is_cuda:
            return words(self, **options)
        return f"Tensor(shape={tuple(self.shape)}, dtype={self.dtype}, device={self.device})"

    _set(torch.Tensor, "__repr__", told)


def _patch_solvers() -> None:
    """A factorization has converged, whatever the flag says that its kernel has not written; the
    flag is read, which is what a capture breaks on."""

    def read(infos: torch.Tensor, api_name: str, *, is_matrix: bool) -> None:
        infos.any().item()

    _SOLVERS.impl("_linalg_check_errors", read, "CUDA")


def _patch_looks() -> None:
    """Functions that ask the device whether something is wrong get no for an answer."""
    # The images' range and "not finite" of the first call; labels and rows.
    _set(ranges, "within", lambda name, x, low, high: x)
    _set(ranges, "within_if_finite", lambda name, x, low, high: (x, True))
    for name in ("require_finite", "require_labels", "require_rows"):
        _set(ranges, name, lambda *given: None)
    _set(Step, "_checked", _saying_no(Step._checked))
    # One look that compares numbers without a boolean: whole numbers are read by their values.
    _set(agreement, "moved_alike", lambda before, first, second: True)
    _set(bn_momentum, "moved_alike", lambda before, first, second: True)


def _patch_reactions() -> None:
    """What the engine makes of a number it has read: faults, skipped updates, images that no
    attack moved, an evaluation's trouble."""
    _set(Faults, "check", lambda self: None)
    _set(Faults, "healthy", lambda self: True)
    _set(Updater, "check", lambda self: None)
    _set(Updater, "healthy", lambda self: True)
    _set(UnmovedCounter, "sentence", lambda self: None)
    _set(Tally, "_raise_trouble", lambda self: self.trouble.tolist())


def _saying_no(function: Callable[..., Any]) -> Callable[..., Any]:
    """Inside ``function`` a boolean on the device says no: nothing is wrong."""

    @functools.wraps(function)
    def call(*given: Any, **options: Any) -> Any:
        before, _answer[0] = _answer[0], False
        try:
            return function(*given, **options)
        finally:
            _answer[0] = before

    return call


def _set(owner: Any, name: str, value: Any) -> None:
    """Patch, but only what is there: a name that has moved must be noticed here."""
    if not hasattr(owner, name):
        raise AttributeError(f"{owner} has no {name} any more; numbers_off.py must follow.")
    setattr(owner, name, value)


# -- the pytest plugin -----------------------------------------------------------------------------


def pytest_configure(config: pytest.Config) -> None:
    switch_off()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Iterator[None]:
    name = getattr(item, "originalname", item.name)
    try:
        yield
    except AssertionError:
        if name not in COMPARE:
            raise
        item.user_properties.append(("compared", COMPARE[name]))
