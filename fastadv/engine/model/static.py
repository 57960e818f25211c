"""Checks that a network's forward pass is the same operations in every call.

A CUDA graph repeats kernels. What Python decides anew in each call (a number from its generators, a
branch on a tensor's value, a counter) would stay what it was at the recording. A replay cannot
notice that, so the network is checked here, once before each recording.
"""

from __future__ import annotations

import random
import sys
from collections.abc import Callable, Hashable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.jit import ScriptModule
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fastadv.engine.model.agreement import draws_kept, host_draws_kept
from fastadv.engine.model.forward_trace import Trace, traced
from fastadv.engine.model.network import Network
from fastadv.engine.model.python_state import PythonState, modules_of
from fastadv.engine.model.python_values import frozen

SEEDS = (1, 2, 3)  # seeds of the generators of Python and numpy, one call with each


def why_not_static(
    net: Network,
    state: PythonState,
    x: Tensor,
    attack_bn: str,
    losses: Iterable[Callable[[Tensor], Tensor]] = (),
) -> str | None:
    """What a forward pass over ``x`` (B,C,H,W) decides anew in every call, in words, or None.

    Checked are the modes of an attack and of training, the other networks in ``state``, and the
    user's ``losses``, functions of the logits. Buffers, attributes and generators are restored.
    """
    every = [module for model in state.models.values() for module in model.modules()]
    if any(isinstance(module, ScriptModule) for module in every):
        return "TorchScript keeps attributes where Python does not see them change"
    modules = [module for model in state.models.values() for module in modules_of(model)]
    for name, module, key in state.attributes():
        if hasattr(vars(module)[key], "__next__"):
            return f"the iterator {name!r} may give something else in every call"
    others = [model for model in state.models.values() if model is not net.model]
    with ExitStack() as stack:
        for keeping in (
            draws_kept(net.device),
            host_draws_kept(),
            _own_generators_kept(modules),
            state.kept(),
            _tensors_kept(state),
            net.keeping_buffers(),
        ):
            stack.enter_context(keeping)
        if net.block_hooks is not None:
            stack.enter_context(net.block_hooks.on())
        reason = None
        with net.attacking(attack_bn):
            reason = _reason(net, state, lambda: net.logits(x))
        if reason is None:
            with net.training():
                reason = _reason(net, state, lambda: net.logits(x))
        for model in others:
            reason = reason or _reason(net, state, partial(net.logits_of, model, x))
        for loss in losses if reason is None else ():
            with torch.no_grad(), net.evaluating():
                logits = net.logits(x)
            found = _reason(net, state, partial(loss, logits))
            reason = reason or (found and found.replace("its forward", "the criterion"))
    return reason


def _reason(net: Network, state: PythonState, forward: Callable[[], Tensor]) -> str | None:
    forward()  # creates what the model creates in its first call only
    before = dict(state.values())
    places = {name: (module, key) for name, module, key in state.attributes()}
    tensors = _tensors(state)
    modules = [module for module, _ in places.values()]
    generators = _generator_states(modules)
    host = torch.get_rng_state() if net.device.type == "cuda" else None
    with _Reads(tensors.values()) as reads:
        # The logits are dropped: they would keep the activations of a batch in memory.
        first = traced(forward)[1]
    if first.draws:
        return f"its forward draws from Python's generator {first.draws[0]!r}"
    if generators != _generator_states(modules):
        return "its forward draws from a random generator of its own"
    if host is not None and not torch.equal(host, torch.get_rng_state()):
        return "its forward draws from PyTorch's generator of the CPU"
    if first.looks:
        return f"its forward looks at the value of a tensor by {first.looks[0]!r}"
    for name, value in state.values():
        if before.get(name, state) == value:
            continue
        tensor = tensors.get(name)
        if tensor is None or not isinstance(vars(places[name][0]).get(places[name][1]), Tensor):
            return f"its forward changes {name!r}, which Python keeps"
        if tensor.data_ptr() in reads.found:
            return f"its forward carries the tensor {name!r} to the next call; register a buffer"
        state.skip(*places[name])
    return _other_seeds(forward, first)


def _other_seeds(forward: Any, first: Trace) -> str | None:
    numpy: Any = sys.modules.get("numpy")
    for seed in SEEDS:
        random.seed(seed)
        if numpy is not None:
            numpy.random.seed(seed)
        other = traced(forward)[1]
        difference = first.difference(other)
        if difference is not None:
            return f"its forward is not the same in two calls: {difference}"
    return None


def _tensors(state: PythonState) -> dict[str, Tensor]:
    """Name -> tensor, for attributes of modules that are neither parameters nor buffers."""
    found = {name: vars(module)[key] for name, module, key in state.attributes()}
    return {name: value for name, value in found.items() if isinstance(value, Tensor)}


@contextmanager
def _tensors_kept(state: PythonState) -> Iterator[None]:
    """The values of the tensors of ``_tensors`` are restored at the end of this context."""
    before = [(tensor, tensor.detach().clone()) for tensor in _tensors(state).values()]
    try:
        yield
    finally:
        with torch.no_grad():
            for tensor, value in before:
                if not torch.equal(tensor, value):
                    tensor.copy_(value)


class _Reads(TorchDispatchMode):
    """Records in ``found`` the addresses of those ``tensors`` that an operation takes as input."""

    def __init__(self, tensors: Any) -> None:
        super().__init__()
        self._watched = {tensor.data_ptr() for tensor in tensors}
        self.found: set[int] = set()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if self._watched:
            taken = [t for t in tree_leaves((args, kwargs or {})) if isinstance(t, Tensor)]
            self.found |= self._watched & {tensor.data_ptr() for tensor in taken}
        return func(*args, **(kwargs or {}))


# -- generators that are attributes ---------------------------------------------------------------


def _generators(modules: Iterable[nn.Module]) -> list[Any]:
    numpy: Any = sys.modules.get("numpy")
    kinds: tuple[type, ...] = (random.Random, torch.Generator)
    if numpy is not None:
        kinds += (numpy.random.Generator, numpy.random.RandomState)
    values = [value for module in modules for value in vars(module).values()]
    return [
        value
        for value in dict(zip(map(id, values), values, strict=True)).values()
        if isinstance(value, kinds)
    ]


def _state_of(generator: Any) -> Any:
    if isinstance(generator, torch.Generator):
        return bytes(generator.get_state().tolist())
    if isinstance(generator, random.Random):
        return generator.getstate()
    return (
        generator.bit_generator.state
        if hasattr(generator, "bit_generator")
        else (generator.get_state(legacy=False))
    )


def _generator_states(modules: Iterable[nn.Module]) -> list[Hashable]:
    return [frozen(_state_of(generator)) for generator in _generators(modules)]


@contextmanager
def _own_generators_kept(modules: Iterable[nn.Module]) -> Iterator[None]:
    before = [(generator, _state_of(generator)) for generator in _generators(modules)]
    try:
        yield
    finally:
        for generator, state in before:
            if isinstance(generator, torch.Generator):
                generator.set_state(torch.tensor(list(state), dtype=torch.uint8))
            elif isinstance(generator, random.Random):
                generator.setstate(state)
            elif hasattr(generator, "bit_generator"):
                generator.bit_generator.state = state
            else:
                generator.set_state(state)
