"""A step acts on the model and the optimizer as they are now, not as they were when it was built.

Between two calls a head may be replaced, layers may be unfrozen, groups may be added. Everything
derived from the old model is derived again. A parameter that would silently not be trained is an
error.
"""

from __future__ import annotations

from collections.abc import Callable
from operator import attrgetter, is_
from typing import Any

import torch
from torch import Tensor, nn

from fastadv.algorithms.plan import Plan
from fastadv.engine.model.block_hooks import BlockHooks
from fastadv.engine.model.network import Network
from fastadv.errors import UserError
from fastadv.training.update import Update

Blocks = list[tuple[str, nn.Module]]
_LEARNS = attrgetter("requires_grad")


class Changes:
    """Keeps the ``update``, the parts and the block hooks of a step in line with the present model.

    ``blocks`` finds the modules with hooks; None if no part asks for them.
    """

    def __init__(
        self,
        plan: Plan,
        net: Network,
        update: Update,
        optimizer: torch.optim.Optimizer,
        blocks: Callable[[], Blocks] | None,
    ) -> None:
        self.plan, self.net, self.update, self.optimizer = plan, net, update, optimizer
        self._blocks = blocks
        if blocks is not None:
            net.block_hooks = _hooks_of(blocks())
        plan.layers.bind(net.model, optimizer)
        self._named: dict[str, Tensor] = dict(net.structure.parameters)
        self._version = net.structure.version
        update.parameters.follow()
        self._averaged: dict[str, Tensor] = update.parameters.averaged()
        # Parameters that require grad and that the user keeps out of the optimizer.
        held = {id(parameter) for parameter in self._held()}
        learning = update.parameters.learning_named()
        self._outside = {name: p for name, p in learning.items() if id(p) not in held}
        self._seen: list[Any] = []
        self._counts: list[int] = []
        self._dtype: torch.dtype | None = None

    def follow(self, *, prepared: bool) -> None:
        """Take over the names and parameters of the present model, and let the average follow.
        ``prepared`` is True if the parts have their state."""
        self.net.follow()
        version = self.net.structure.version
        if version == self._version:
            return
        self.update.parameters.follow()
        averaged = self.update.parameters.averaged()
        known = {id(tensor): name for name, tensor in self._averaged.items()}
        old = {name: known[id(each)] for name, each in averaged.items() if id(each) in known}
        if self.plan.averaging is not None and prepared:
            self.plan.averaging.replaced(averaged, old)
        self._named, self._version = dict(self.net.structure.parameters), version
        self._averaged = averaged

    def follow_to_train(self, *, prepared: bool) -> None:
        """``follow``, and everything else that training needs. Raises ``UserError``, in every call
        until it is corrected, for a change that the step cannot take over."""
        self.follow(prepared=prepared)
        self._require_place()
        seen = self._held()
        counts = [self._version, *self._groups(), *map(_LEARNS, self._named.values())]
        same = len(seen) == len(self._seen) and all(map(is_, seen, self._seen))
        if same and counts == self._counts:
            return
        if self._blocks is not None:
            self._follow_blocks(self._blocks())
        if prepared:
            for part in self.plan.parts.values():
                part.follow_model()
        self.plan.layers.bind(self.net.model, self.optimizer)
        self.update.parameters.follow()
        self._require_held()
        self._seen, self._counts = seen, counts
        self._dtype = next(iter(self._named.values())).dtype

    def _groups(self) -> list[int]:
        return [len(group["params"]) for group in self.optimizer.param_groups]

    def _held(self) -> list[Tensor]:
        return [p for group in self.optimizer.param_groups for p in group["params"]]

    def _follow_blocks(self, found: Blocks) -> None:
        hooks = self.net.block_hooks
        if hooks is None or [name for name, _ in found] != hooks.names:
            raise UserError(
                "The model's residual blocks have changed since the step was built, and each has "
                "its own step size: build the step again."
            )
        if not all(map(is_, hooks.convolutions, (module for _, module in found))):
            self.net.block_hooks = _hooks_of(found)

    def _require_place(self) -> None:
        first = next(iter(self._named.values()), None)
        if first is None:
            raise UserError("The model has no parameters any more.")
        for now, then in ((first.device, self.net.device), (first.dtype, self._dtype)):
            if then is not None and now != then:
                raise UserError(
                    f"The model was {_short(then)} when the step began and is {_short(now)} now: "
                    "build the optimizer and the step again."
                )

    def _require_held(self) -> None:
        """Raise ``UserError`` unless every parameter that learns is in a group of the optimizer.
        Parameters that were outside of it when the step was built are exempt."""
        held = {id(parameter) for parameter in self._held()}
        learning = self.update.parameters.learning_named()
        if not learning:
            raise UserError("All of the model's parameters are frozen (requires_grad=False).")
        chosen = {id(parameter) for parameter in self._outside.values()}
        for name, parameter in learning.items():
            if id(parameter) not in held | chosen and name not in self._outside:
                raise UserError(
                    f"The parameter {name} learns now (requires_grad=True) and no group of the "
                    "optimizer holds it: pass it to optimizer.add_param_group, freeze it, or build "
                    "the optimizer and the step again."
                )

    def __getstate__(self) -> dict[str, Any]:
        return vars(self) | {"_seen": []}


def _hooks_of(blocks: Blocks) -> BlockHooks:
    return BlockHooks([name for name, _ in blocks], [module for _, module in blocks])


def _short(value: torch.device | torch.dtype) -> str:
    if isinstance(value, torch.device):
        return f"on {value}"
    return str(value).removeprefix("torch.")
