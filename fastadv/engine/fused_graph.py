"""A pass over the graph of a compiled region: BatchNorm in training mode, with the ReLU after it
and the residuals added before and after it, becomes ``torch.ops.fastadv.fused_norm_shared``.

A compiler stores neither the sum that BatchNorm reads nor ReLU's mask, and reads what they are made
of several times; the operator's kernels move fewer bytes. The pass looks at the graph that Dynamo
traced, so it works for any network. It replaces a BatchNorm only where values, gradients and
running buffers stay the same, and where the tensors that the operator reads and writes are stored
anyway; it leaves everything else to the compiler.
"""

from __future__ import annotations

import copy
import operator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph, GraphModule, Node
from torch.nn import functional

from fastadv.engine.graph_writes import argument, between, is_barrier, storages, written
from fastadv.kernels import FUSED_NORM_SHARED
from fastadv.kernels.dispatch import TRITON_DTYPES

# Where the own kernels are used; tests without a GPU set both.
DEVICES = ("cuda",)
DTYPES = TRITON_DTYPES

_NORMS = (functional.batch_norm,)
_RELUS = (functional.relu, torch.relu, torch.relu_)
_ADDS = (operator.add, operator.iadd, torch.add)
_METHODS = {"relu": ("relu", "relu_"), "add": ("add", "add_", "__add__", "__iadd__", "__radd__")}
# A compiler does not fuse these with what is around them: they read and write memory.
_CONVOLUTIONS = (
    *(torch.conv1d, torch.conv2d, torch.conv3d),
    *(torch.conv_transpose1d, torch.conv_transpose2d, torch.conv_transpose3d),
)
_PRODUCTS = (*_CONVOLUTIONS, torch.matmul, functional.linear)
_ASK_FOR_GRADIENTS = (torch.autograd.grad, "register_hook", "retain_grad")
_BEFORE = 3  # place in the operator's arguments
_Y, _Y_AGAIN, _TOTAL = 0, 1, 2  # and in what it returns


def fuse_norms(module: GraphModule) -> int:
    """Change the graph of ``module`` in place; returns the number of operators in it."""
    graph = module.graph
    if any(_differentiates_twice(node) for node in graph.nodes):
        return 0
    found = []
    for node in list(graph.nodes):
        pattern = _pattern(node) if _calls(node, _NORMS) else None
        if pattern is not None:
            found.append(_replace(graph, pattern))
    for called, y in found:
        _share(graph, called, y)
    if found:
        graph.lint()
        module.recompile()
    return len(found)


@dataclass(frozen=True)
class _Pattern:
    """y = relu(norm(x + before) + after), where ``total`` is the node of x + before, or x itself
    without ``before``, and ``plus`` the node that adds ``after``. What is not there is None."""

    norm: Node
    total: Node
    x: Node
    before: Node | None = None
    plus: Node | None = None
    after: Node | None = None
    relu: Node | None = None

    @property
    def place(self) -> Node:
        """The node before which the operator is called."""
        return self.plus or self.norm


def _pattern(norm: Node) -> _Pattern | None:
    """The largest pattern around ``norm`` that may be replaced."""
    total = argument(norm, "input")
    if not isinstance(total, Node) or not _is_exact(norm, total):
        return None
    found = _Pattern(norm, total, total)
    found = _with_tail(found)
    if found.relu is None and not all(_stores(user) for user in norm.users):
        return None
    found = _with_before(found)
    return found if found.before or _is_stored(total) or _summands(total) else None


def _is_exact(norm: Node, total: Node) -> bool:
    """True if the operator computes what ``norm`` does."""
    value = _tensor(total)
    running = [argument(norm, name) for name in ("running_mean", "running_var")]
    numbers = [argument(norm, name) for name in ("momentum", "eps")]
    return (
        value is not None
        and value.device.type in DEVICES
        and value.dtype in DTYPES
        and value.dim() == 4
        and value.is_contiguous(memory_format=torch.channels_last)
        and _alike(norm, total)
        and argument(norm, "training") is True
        and (running[0] is None) == (running[1] is None)
        and all(type(number) in (int, float) for number in numbers)
    )


def _with_tail(found: _Pattern) -> _Pattern:
    """``found`` with the ReLU, and with the residual before it, if they are there."""
    norm = found.norm
    user = _only_user(norm)
    if user is None:
        return found
    if _is_relu(user, norm):
        return found if _crosses_barrier(norm, user) else replace(found, relu=user)
    summands = _summands(user)
    relu = _only_user(user)
    if summands is None or relu is None or not _is_relu(relu, user) or user.args == (norm, norm):
        return found
    if _is_in_place(user) and summands[0] is not norm:
        return found  # it changes the other summand, which others may read
    after = summands[1] if summands[0] is norm else summands[0]
    if not _is_stored(after) and not _calls(after, _NORMS):
        return found
    # The running buffers move, and x is read, at the sum instead of at ``norm``.
    buffers = storages(_parameters(norm)[2:])
    reads = storages([found.x, *_parameters(norm)])
    for node in between(norm, user):
        if written(node) & reads or storages(node.all_input_nodes) & buffers:
            return found
    if _crosses_barrier(norm, relu):
        return found
    return replace(found, plus=user, after=after, relu=relu)


def _with_before(found: _Pattern) -> _Pattern:
    """``found`` with the sum that it normalises taken apart, if it is one."""
    total, place = found.total, found.place
    summands = _summands(total)
    if summands is None or not all(map(_is_stored, summands)) or found.after is total:
        return found  # the operator cannot read what it returns
    x, before = summands
    if _is_in_place(total) and not (_calls(x, _PRODUCTS) and _only_user(x) is total):
        return found  # another tensor may be the same memory
    if _crosses_barrier(total, place) or not all(_only_reads(user, total) for user in total.users):
        return found
    reads = storages(summands)
    for node in between(total, place):
        if written(node) & reads or (total in node.all_input_nodes and node is not found.norm):
            return found
    return replace(found, x=x, before=before)


def _replace(graph: Graph, found: _Pattern) -> tuple[Node, Node]:
    """Returns the call of the operator, and its y."""
    weight, bias, *buffers = _parameters(found.norm)
    numbers = [float(argument(found.norm, name)) for name in ("momentum", "eps")]
    last = found.relu or found.norm
    with graph.inserting_before(found.place):
        called = graph.call_function(
            FUSED_NORM_SHARED,
            (
                *(found.x, weight, bias, found.before, found.after, *buffers, *numbers),
                found.relu is not None,
            ),
        )
        y = graph.call_function(operator.getitem, (called, _Y))
        total = graph.call_function(operator.getitem, (called, _TOTAL))
    called.meta, y.meta = copy.copy(found.norm.meta), copy.copy(last.meta)
    called.meta["example_value"] = _tensor(last), _tensor(found.total)
    last.replace_all_uses_with(y)
    for node in (found.relu, found.plus, found.norm):
        if node is not None:
            graph.erase_node(node)
    if found.before is None:
        graph.erase_node(total)
    else:
        total.meta = copy.copy(found.total.meta)
        found.total.replace_all_uses_with(total)
        graph.erase_node(found.total)
    return called, y


def _share(graph: Graph, called: Node, y: Node) -> None:
    """Let a second reader of ``y``, and those that read x after the operator ``called``, read
    results of their own: the operator adds their gradients as it reads them.

    The gradients of ``y`` are read twice, so this saves bytes only where both are stored anyway.
    """
    readers = list(y.users)
    if len(readers) == 2 and all(_stores(each) and _only_reads(each, y) for each in readers):
        _redirect(graph, readers[1:], y, called, _Y_AGAIN)
    x, before = called.args[0], called.args[_BEFORE]
    if before is None and isinstance(x, Node):
        later = _readers_after(called, x)
        if later and all(_only_reads(each, x) for each in later):
            _redirect(graph, later, x, called, _TOTAL)


def _redirect(graph: Graph, readers: list[Node], of: Node, called: Node, place: int) -> None:
    with graph.inserting_after(called):
        result = graph.call_function(operator.getitem, (called, place))
    result.meta = copy.copy(of.meta)
    for reader in readers:
        reader.replace_input_with(of, result)


def _readers_after(node: Node, of: Node) -> list[Node]:
    """The users of ``of`` that come after ``node`` in the graph."""
    found = []
    following = node.next
    while following.op != "root":
        if of in following.all_input_nodes:
            found.append(following)
        following = following.next
    return found


def _differentiates_twice(node: Node) -> bool:
    """True if the gradient of a gradient may be taken, which the operator does not have."""
    if _calls(node, (torch.autograd.grad,)) or node.target == "backward":
        return bool(argument(node, "create_graph"))
    module = getattr(node.target, "__module__", None) or ""
    return "functorch" in module or "forward_ad" in module


def _calls(node: Node, functions: tuple[Any, ...], methods: str = "") -> bool:
    if node.op == "call_method":
        return node.target in _METHODS.get(methods, ())
    return node.op == "call_function" and node.target in functions


def _is_relu(node: Node, of: Node) -> bool:
    return _calls(node, _RELUS, "relu") and node.all_input_nodes == [of] and _alike(node, of)


def _summands(node: Node) -> tuple[Node, Node] | None:
    """The two tensors that ``node`` adds, if it is a plain sum of tensors of its own shape, type
    and layout."""
    if not _calls(node, _ADDS, "add") or len(node.args) != 2 or node.kwargs:
        return None
    first, second = node.args
    if not isinstance(first, Node) or not isinstance(second, Node):
        return None
    return (first, second) if _alike(first, node) and _alike(second, node) else None


def _is_in_place(add: Node) -> bool:
    return add.target is operator.iadd or add.target in ("add_", "__iadd__")


def _is_stored(node: Node) -> bool:
    """True if the tensor is in memory in any case."""
    if _calls(node, _CONVOLUTIONS) and _has_bias(node):
        return any(map(_stores, node.users))  # a compiler adds the bias where it reads the product
    if node.op == "placeholder" or _calls(node, _PRODUCTS):
        return True
    return _is_result(node) or any(map(_stores, node.users))


def _has_bias(convolution: Node) -> bool:
    given = dict(zip(("input", "weight", "bias"), convolution.args, strict=False))
    return (given | convolution.kwargs).get("bias") is not None


def _stores(user: Node) -> bool:
    """True if ``user`` reads its tensors from memory."""
    return _calls(user, (*_PRODUCTS, FUSED_NORM_SHARED))


def _is_result(node: Node) -> bool:
    of = node.args[0] if _calls(node, (operator.getitem,)) else None
    return isinstance(of, Node) and of.target is FUSED_NORM_SHARED


def _only_reads(user: Node, node: Node) -> bool:
    """False if ``user`` may write ``node``, or ask for its gradient: each of the operator's results
    has only a part of it."""
    asks = is_barrier(user) or user.target in _ASK_FOR_GRADIENTS
    return not asks and not written(user) & storages([node])


def _crosses_barrier(first: Node, last: Node) -> bool:
    return any(map(is_barrier, between(first, last)))


def _only_user(node: Node) -> Node | None:
    return next(iter(node.users)) if len(node.users) == 1 else None


def _parameters(norm: Node) -> list[Node | None]:
    names = ("weight", "bias", "running_mean", "running_var")
    return [argument(norm, name) for name in names]


def _alike(first: Node, second: Node) -> bool:
    """True if both are tensors of one shape, type, device and layout."""
    one, other = _tensor(first), _tensor(second)
    return (
        one is not None
        and other is not None
        and one.shape == other.shape
        and one.dtype == other.dtype
        and one.device == other.device
        and one.stride() == other.stride()
    )


def _tensor(node: Node) -> Tensor | None:
    value = node.meta.get("example_value")
    return value if isinstance(value, Tensor) else None
