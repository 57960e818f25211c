"""Switches off decisions that depend on numbers, because the pretended CUDA runtime computes none.

Importable (``switch_off()``) and a pytest plugin (``-p numbers_off``). Shapes, types, launches,
synchronisation and the rules of captures do not change. The docstring of each patch gives its
reason. A value that is read from the device is still read, so that the read still synchronises.
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
from fastadv.evaluation.trouble import Trouble
from fastadv.training.calls import Calls
from fastadv.training.unmoved import UnmovedCounter

TESTS = Path(__file__).resolve().parents[2] / "tests"

# Tests that compare numbers by ``==`` or with their own limit, so that no patch of a function can
# make them pass: they run up to that line, whose AssertionError is expected.
COMPARE = {
    "test_evaluation_on_the_gpu_is_the_one_on_the_cpu": "two evaluations are compared by ==",
    "test_weights_come_back_exactly": "weights must differ from those before they were perturbed",
}

_SOLVERS = torch.library.Library("aten", "IMPL")  # its registrations live as long as this object
_answer = [True]  # the result of reading a boolean from the device


def switch_off() -> None:
    """Patch the engine and torch. Call it once per process."""
    _patch_reads()
    _patch_words()
    _patch_solvers()
    _patch_looks()
    _patch_reactions()


def _patch_reads() -> None:
    """A boolean on the device is True: "finite", "equal", "all of them". It is still read, which
    synchronises, and breaks a capture."""
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
        # Counts, such as of correct predictions, are sums that the device has not computed.
        counts = self.is_cuda and not self.dtype.is_floating_point
        return torch.zeros(self.shape, dtype=self.dtype).tolist() if counts else value

    def same(first: torch.Tensor, second: torch.Tensor) -> bool:
        value = equal(first, second)
        # A test may copy both to the host first; their values are still not computed.
        asked_by = Path(sys._getframe(1).f_code.co_filename)
        return value or first.is_cuda or TESTS in asked_by.parents

    _set(torch.Tensor, "__bool__", boolean)
    _set(torch.Tensor, "item", one)
    _set(torch.Tensor, "tolist", several)
    _set(torch, "equal", same)
    _set(torch.testing, "assert_close", lambda *values, **options: None)


def _patch_words() -> None:
    """A tensor on the device is printed as its shape: formatting its values would allocate as much
    memory as the undefined values ask for."""
    words = torch.Tensor.__repr__

    def told(self: torch.Tensor, **options: Any) -> str:
        if not self.is_cuda:
            return words(self, **options)
        return f"Tensor(shape={tuple(self.shape)}, dtype={self.dtype}, device={self.device})"

    _set(torch.Tensor, "__repr__", told)


def _patch_solvers() -> None:
    """A factorization counts as converged, because its kernel does not write the flag. The flag is
    still read, which breaks a capture."""

    def read(infos: torch.Tensor, api_name: str, *, is_matrix: bool) -> None:
        infos.any().item()

    _SOLVERS.impl("_linalg_check_errors", read, "CUDA")


def _patch_looks() -> None:
    """Checks of values on the device find nothing wrong."""
    # Range and finiteness of the images in the first call; labels and rows.
    _set(ranges, "within", lambda name, x, low, high: x)
    _set(ranges, "within_if_finite", lambda name, x, low, high: (x, True))
    for name in ("require_finite", "require_labels", "require_rows"):
        _set(ranges, name, lambda *given: None)
    _set(Calls, "checked", _saying_no(Calls.checked))
    # A comparison of numbers on the host, which reads no boolean from the device.
    _set(agreement, "moved_alike", lambda before, first, second: True)
    _set(bn_momentum, "moved_alike", lambda before, first, second: True)


def _patch_reactions() -> None:
    """The engine does not react to numbers it has read: faults, skipped updates, images that the
    attack did not move, problems of an evaluation."""
    _set(Faults, "check", lambda self: None)
    _set(Faults, "healthy", lambda self: True)
    _set(Updater, "check", lambda self: None)
    _set(Updater, "healthy", lambda self: True)
    _set(UnmovedCounter, "sentence", lambda self: None)
    _set(Trouble, "raise_found", lambda self: self._found.tolist())


def _saying_no(function: Callable[..., Any]) -> Callable[..., Any]:
    """``function``, during which a boolean on the device is False: nothing is wrong."""

    @functools.wraps(function)
    def call(*given: Any, **options: Any) -> Any:
        before, _answer[0] = _answer[0], False
        try:
            return function(*given, **options)
        finally:
            _answer[0] = before

    return call


def _set(owner: Any, name: str, value: Any) -> None:
    """Patch an attribute that exists; raises ``AttributeError`` for one that was renamed."""
    if not hasattr(owner, name):
        raise AttributeError(f"{owner} has no {name}; rename it in numbers_off.py.")
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
