"""A tensor that is computed when it is read, unless what reads it needs something else.

``F.relu(bn(x))`` is one kernel over x if BatchNorm waits until ReLU is called. So BatchNorm returns
a ``Pending``: a tensor with shape, type and history, but without values. ReLU and additions ask its
``source`` for what they need. Everything else reads it, and from then on it is an ordinary tensor.

The history of a ``Pending`` is complete: code that takes it without Python's notice, such as
``apply`` of an autograd Function, reaches its gradient. What is computed around it has a history of
its own, so a gradient with respect to it or a hook on it must come before, or is refused.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any, Protocol, cast

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map_only

from fastadv.engine.model.tensor_functions import (
    ADD,
    HISTORY,
    IN_PLACE,
    METADATA,
    RECORD,
    RELU,
    changes_first,
)
from fastadv.errors import UserError

_PLAINLY = torch._C.DisableTorchFunctionSubclass


class Source(Protocol):
    """How a pending tensor is computed, and what can be computed without it."""

    def fresh(self) -> bool:
        """True if nothing that it is computed from has changed in place."""

    def value(self) -> Tensor:
        """The value, in new memory and without history."""

    def relu(self, recorded: bool) -> Tensor | None:
        """ReLU of it, with history if ``recorded``; None if it must be read for that."""

    def plus(self, other: Tensor) -> Pending | None:
        """It and ``other``, a tensor of its shape; None if it must be read for that."""


class Pending(Tensor):
    """A tensor whose values ``source`` computes."""

    source: Source | None  # None: forgotten
    recorded: bool  # True if it requires grad
    bypassed: bool  # True if a gradient flows around it
    _value: Tensor | None  # the values, once they are read
    _connected: bool  # True if ``_value`` has the history
    _seen: int  # the version of ``_value`` as read
    _now: Tensor | None  # what a change in place has made of it
    _kept: bool  # True if other code wants its gradient
    _version_as_made: int

    @staticmethod
    def of(source: Source, like: Tensor, recorded: bool) -> Pending:
        """A pending tensor with shape, type and strides of ``like``. If it is ``recorded``, call
        this in the forward of an autograd Function that returns it."""
        made: Pending = Tensor._make_wrapper_subclass(
            Pending, like.shape, strides=like.stride(), dtype=like.dtype, device=like.device
        )
        made.source, made.recorded, made.bypassed = source, recorded, False
        made._value, made._connected, made._seen = None, False, 0
        made._now, made._kept, made._version_as_made = None, False, 0
        _handed_out.append(weakref.ref(made))
        return made

    def read(self) -> Tensor:
        """Its value, a plain tensor; always the same one, unless it is changed in place."""
        self._look()
        if self._now is not None:
            return plain(self._now)
        value = self._values()
        if not self._connected:
            self._connected = True
            if self.recorded:
                with torch.enable_grad():
                    _Read.apply(self, [value])  # gives ``value`` its history
        return value

    def has_value(self) -> bool:
        """True if it must be read for every use: it is read already, or other code wants its
        gradient."""
        return self._connected or self._kept or self._now is not None

    def become(self, value: Tensor) -> None:
        """Take ``value``, computed around it with history, as its value from now on."""
        self._value, self._connected, self._seen = value, True, value._version
        self.bypassed = True

    def give(self, values: Tensor) -> None:
        """Take its ``values``, without history, which were computed elsewhere."""
        self._value, self._seen = values, values._version

    def given(self) -> Tensor | None:
        """Its values, if they are computed."""
        return self._value

    def settle(self) -> None:
        """Compute the values, if that is still possible."""
        if self._now is None and self._value is None and self.source and self.source.fresh():
            self._values()

    def _values(self) -> Tensor:
        if self._value is None:
            source = self._fresh_source()
            with torch.inference_mode(False), torch.no_grad():
                self.give(source.value())
        return cast("Tensor", self._value)

    def _fresh_source(self) -> Source:
        if self.source is None or not self.source.fresh():
            raise refusal("changes the input of a BatchNorm in place before it reads the output")
        return self.source

    def _asked(self) -> Source | None:
        """The source, if it may be asked for something else than the value."""
        self._look()
        if self._now is not None or self._kept or self.source is None:
            return None
        if self._value is not None and not self.source.fresh():
            return None
        return self._fresh_source()

    def _changed(self, now: Tensor) -> None:
        """It was changed in place, and is ``now``."""
        self._now = now
        if torch.is_grad_enabled() and now.requires_grad:
            _Follow.apply(self, now)
            self.recorded = True
            with _PLAINLY():
                self._version_as_made = self._version

    def _may_change(self) -> bool:
        """True if a change in place can be computed by the source: nobody has its memory."""
        return self._value is None and (torch.is_grad_enabled() or not self.recorded)

    def _look(self) -> None:
        """Find out if it was changed in place without its notice: by a view of its value, or in an
        autograd Function."""
        with _PLAINLY():
            version = self._version
        if version != self._version_as_made:
            raise refusal("changes the output of a BatchNorm in place in an autograd Function")
        if self._now is None and self._connected:
            value = cast("Tensor", self._value)
            if value._version != self._seen:
                self._changed(value)

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if torch.compiler.is_compiling():
            raise refusal("calls a compiled function")
        kwargs = kwargs or {}
        handler = _HANDLERS.get(func)
        if handler is not None:
            found = handler(func, args, kwargs)
            if found is not NotImplemented:
                return found
        changed = _changed_by(func, args, kwargs)
        found = func(*plain(args), **plain(kwargs))
        for each in changed:
            each._changed(each.read())
        return found

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func._schema.is_mutable:
            for argument, value in zip(func._schema.arguments, args, strict=False):
                written = argument.alias_info is not None and argument.alias_info.is_write
                if written and any(isinstance(leaf, Pending) for leaf in tree_leaves(value)):
                    raise refusal("changes the output of a BatchNorm in place in compiled code")
        return func(*_below(args), **_below(kwargs))


_handed_out: list[weakref.ref[Pending]] = []  # since the last ``forget``


def settle() -> None:
    """Compute what other code has kept of the pending tensors: their inputs may change now."""
    global _handed_out
    alive = [(reference, reference()) for reference in _handed_out]
    _handed_out = [reference for reference, kept in alive if kept is not None]
    for _, kept in alive:
        if kept is not None:
            kept.settle()


def forget() -> None:
    """Forget the pending tensors. Those that are settled are ordinary tensors now."""
    for reference in _handed_out:
        kept = reference()
        if kept is not None and (kept.given() is not None or kept.has_value()):
            kept.source = None
    _handed_out.clear()


def refusal(what: str) -> UserError:
    """The error for a network that does ``what``."""
    return UserError(
        f"The model {what}, which fused BatchNorm cannot follow: pass fused_norm='off'."
    )


def plain(value: Any) -> Any:
    """``value`` with every pending tensor in it read."""
    kind = type(value)
    if kind is Pending:
        return value.read()
    if kind is tuple or kind is list:
        return kind(map(plain, value))
    if kind is Tensor or value is None or kind in (int, float, bool, str):
        return value
    return tree_map_only(Pending, Pending.read, value)


def _below(value: Any) -> Any:
    """``value`` with the values of every pending tensor in it, below autograd."""
    return tree_map_only(Pending, lambda pending: _current(pending).detach(), value)


def _current(pending: Pending) -> Tensor:
    now = pending._now
    if isinstance(now, Pending):
        return _current(now)
    return pending._values() if now is None else now


class _Read(torch.autograd.Function):
    """Gives the values, the content of the list, the history of the pending tensor."""

    @staticmethod
    def forward(ctx: Any, pending: Tensor, values: list[Tensor]) -> Tensor:
        return values[0]

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        return gradient, None


class _Follow(torch.autograd.Function):
    """Gives a pending tensor the history of what a change in place has made of it."""

    @staticmethod
    def forward(ctx: Any, pending: Tensor, now: Tensor) -> Tensor:
        ctx.mark_dirty(pending)
        return pending

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        return None, gradient


# -- what is done with it ------------------------------------------------------------------------


def _relu(func: Any, args: Any, kwargs: Any) -> Any:
    pending, in_place = args[0], kwargs.get("inplace", False) or func in IN_PLACE
    source = pending._asked()
    if source is None or (in_place and not pending._may_change()):
        return NotImplemented
    recorded = pending.recorded and torch.is_grad_enabled()
    y = source.relu(recorded)
    if y is None:
        return NotImplemented
    pending.bypassed |= recorded
    if in_place:
        pending._changed(y)
    return y


def _add(func: Any, args: Any, kwargs: Any) -> Any:
    if kwargs or len(args) != 2 or not all(isinstance(each, Tensor) for each in args):
        return NotImplemented
    in_place = func in IN_PLACE
    for one, other in (args,) if in_place else (args, args[::-1]):
        source = one._asked() if type(one) is Pending else None
        if source is None or (in_place and not one._may_change()):
            continue
        with _PLAINLY():
            alike = one.shape == other.shape and one.dtype == other.dtype
        found = source.plus(plain(other)) if alike else None
        if found is not None:
            one.bypassed |= one.recorded
            if in_place:
                one._changed(found)
            return found
    return NotImplemented


def _of_itself(func: Any, args: Any, kwargs: Any) -> Any:
    """Answered without its values."""
    pending = args[0]
    if type(pending) is Pending and pending._now is not None:
        return func(pending._now, *args[1:], **kwargs)
    with _PLAINLY():
        return func(*args, **kwargs)


def _of_the_wrapper(func: Any, args: Any, kwargs: Any) -> Any:
    """Autograd's own record."""
    with _PLAINLY():
        return func(*args, **kwargs)


def _of_its_history(func: Any, args: Any, kwargs: Any) -> Any:
    """Its gradient is wanted."""
    return _of_itself(func, (_wanted(args[0]), *args[1:]), kwargs)


def _grad(func: Any, args: Any, kwargs: Any) -> Any:
    """``torch.autograd.grad`` (outputs, inputs)."""
    outputs, inputs, *others = args
    alone = isinstance(inputs, Tensor)
    wanted = [_wanted(each) for each in ([inputs] if alone else inputs)]
    with _PLAINLY():
        return func(plain(outputs), wanted[0] if alone else wanted, *plain(others), **plain(kwargs))


def _wanted(tensor: Tensor) -> Tensor:
    """The tensor with respect to which autograd finds the gradient for ``tensor``."""
    if type(tensor) is not Pending:
        return tensor
    tensor._look()
    if tensor._now is not None:  # which also gets the gradient for the tensor that follows it
        return _wanted(tensor._now)
    if tensor.bypassed:
        raise refusal("wants the gradient for the output of a BatchNorm after it was used")
    tensor._kept = True
    return tensor


def _changed_by(func: Any, args: Any, kwargs: Any) -> list[Pending]:
    """The pending tensors that ``func`` changes in place."""
    written: list[Any] = [kwargs["out"]] if kwargs.get("out") is not None else []
    if args and changes_first(func, kwargs):
        written.append(args[0])
    if not written:
        return []
    return [leaf for leaf in tree_leaves(written) if type(leaf) is Pending]


_HANDLERS: dict[Any, Callable[[Any, Any, Any], Any]] = (
    dict.fromkeys(METADATA, _of_itself)
    | dict.fromkeys(HISTORY, _of_its_history)
    | dict.fromkeys(RECORD, _of_the_wrapper)
    | dict.fromkeys(RELU, _relu)
    | dict.fromkeys(ADD, _add)
    | {torch.autograd.grad: _grad}
)
