"""What the nodes of a traced graph write in place, seen from their names and the storages of the
tensors that Dynamo traced with. In doubt a node is taken to write all of its arguments."""

from __future__ import annotations

import inspect
import operator
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node
from torch.nn import functional
from torch.utils._pytree import tree_leaves

_IN_PLACE = frozenset(
    getattr(operator, name)
    for name in (
        *("iadd", "isub", "imul", "itruediv", "ifloordiv", "imod", "ipow", "imatmul"),
        *("iand", "ior", "ixor", "ilshift", "irshift", "iconcat", "setitem", "delitem"),
    )
)
# Functions that may move running statistics: which of their arguments is not looked up.
_MOVES_BUFFERS = ("batch_norm", "instance_norm")
_WRITES_NOTHING = ("torch", "_operator", "math")  # unless a name or an argument says so


def between(first: Node, last: Node) -> Iterator[Node]:
    """The nodes after ``first`` and before ``last``, which comes after it."""
    node = first.next
    while node is not last:
        yield node
        node = node.next


def storages(nodes: Iterable[Node | None]) -> set[int]:
    """The storages of the tensors that ``nodes`` return. A view has that of its base."""
    found = set()
    for node in nodes:
        for value in tree_leaves(None if node is None else node.meta.get("example_value")):
            if isinstance(value, Tensor) and value.layout is torch.strided:
                found.add(value.untyped_storage()._cdata)
    return found


def written(node: Node) -> set[int]:
    """The storages that ``node`` may write."""
    return storages(_written(node))


def is_barrier(node: Node) -> bool:
    """True if ``node`` returns nothing that is known, as a switch of gradients or autocast does:
    no operation may be moved across it."""
    return node.op == "call_function" and "example_value" not in node.meta


def argument(node: Node, name: str) -> Any:
    """The argument ``name`` of a call of a Python function; None if it has none or no default."""
    try:
        bound = inspect.signature(node.target).bind(*node.args, **node.kwargs)  # type: ignore[arg-type]
    except (TypeError, ValueError):  # a function of C++
        return node.kwargs.get(name)
    bound.apply_defaults()
    return bound.arguments.get(name)


def _written(node: Node) -> list[Node]:
    target: Any = node.target
    everything, first = node.all_input_nodes, node.all_input_nodes[:1]
    if node.op in ("placeholder", "get_attr", "output"):
        return []
    if node.op == "call_module" or "out" in node.kwargs:
        return everything
    if isinstance(target, torch._ops.HigherOrderOperator):
        return everything  # a graph of its own, such as a checkpoint's or a hook's, is not read
    if node.op == "call_method":
        return first if target.endswith("_") else []
    if isinstance(target, torch._ops.OpOverload):
        return _written_by(target._schema, node)
    if target in _IN_PLACE:
        return first
    if target is functional.batch_norm:
        buffers = argument(node, "running_mean"), argument(node, "running_var")
        return [each for each in buffers if each is not None]
    name = getattr(target, "__name__", "_")
    if name.endswith("_") or any(words in name for words in _MOVES_BUFFERS):
        return everything
    module = getattr(target, "__module__", None) or "unknown"
    if module.partition(".")[0] not in _WRITES_NOTHING or module.startswith("torch._ops"):
        return everything
    return first if argument(node, "inplace") else []


def _written_by(schema: Any, node: Node) -> list[Node]:
    names = [each.name for each in schema.arguments]
    given = dict(zip(names, node.args, strict=False)) | node.kwargs
    found = []
    for each in schema.arguments:
        if each.alias_info is not None and each.alias_info.is_write:
            found += [leaf for leaf in tree_leaves(given.get(each.name)) if isinstance(leaf, Node)]
    return found
