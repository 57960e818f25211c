"""Passes of searches: what they fold, and what they count."""

from __future__ import annotations

from typing import Any

import torch
from test_attacks import images, small_net
from torch.utils._python_dispatch import TorchDispatchMode

from fastadv.evaluation.attacks import inputs
from fastadv.evaluation.search.passes import Passes


class Norms(TorchDispatchMode):
    """Counts the BatchNorms that are computed."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        self.count += "batch_norm" in func.__name__
        return func(*args, **(kwargs or {}))


def test_folds_are_in_use_as_soon_as_they_are_known() -> None:
    model, (x, _) = small_net(), images()
    expected = model(x).detach()
    with Passes(inputs.attacked_network(model, x.device, amp=False)) as passes:
        with Norms() as before:
            torch.testing.assert_close(passes.logits(x, exact=True), expected)
        passes.prepare(x)
        with Norms() as after:
            torch.testing.assert_close(passes.logits(x, exact=True), expected)
    assert (before.count, after.count) == (2, 0)
