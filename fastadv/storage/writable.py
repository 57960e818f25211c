"""Values in the form that the reader of checkpoints accepts: exact types, tensors that own their
elements.

The reader trusts nothing (``checkpoint_file``), so a value that it would refuse must not be
written: a run would train for days and could not be resumed.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from fastadv.errors import UserError
from fastadv.storage.checkpoint_file import DTYPES, MOST_SHARED


def writable(value: Any) -> Any:
    """``value`` with every number, text, dict, list, tuple and tensor of exactly that type.

    Subclasses of ``str`` (torch's version) and of ``float`` (numpy) and parameters become plain.
    Tensors are shared, not copied, except those whose elements overlap or are stored lazily.
    What the reader refuses raises ``UserError`` for a tensor (complex, float8, unsigned
    above 8 bits, sparse: a network of one's own may hold it) and ``TypeError`` for other types.
    """
    return _plain(value, {})


def _plain(value: Any, seen: dict[int, int]) -> Any:
    """``seen``: address of a storage -> number of tensors that use it so far."""
    if value is None or type(value) in (bool, int, float, str):
        return value
    if isinstance(value, Tensor):
        return _plain_tensor(value, seen)
    if isinstance(value, Mapping):
        items = ((_plain(key, seen), _plain(item, seen)) for key, item in value.items())
        if not isinstance(value, OrderedDict):
            return dict(items)
        found = OrderedDict(items)
        if hasattr(value, "_metadata"):  # a state_dict's
            found._metadata = _plain(value._metadata, seen)  # type: ignore[attr-defined]
        return found
    if isinstance(value, (list, tuple)):
        kind = list if isinstance(value, list) else tuple
        return kind(_plain(item, seen) for item in value)
    for number in (int, float):
        if isinstance(value, number):
            return number(value)
    if isinstance(value, str):
        return str.__str__(value)
    raise TypeError(f"A checkpoint cannot hold a {type(value).__name__}")


def _plain_tensor(value: Tensor, seen: dict[int, int]) -> Tensor:
    if value.layout != torch.strided or value.dtype not in DTYPES or value.is_meta:
        kind = f"{value.layout} tensor of {value.dtype} on {value.device}".replace("torch.", "")
        raise UserError(
            f"A checkpoint cannot hold a {kind}; leave it out of the state_dict "
            "(register_buffer(..., persistent=False)), or store it as a real tensor."
        )
    held = value.detach().as_subclass(Tensor)
    if held.is_neg():
        held = held.resolve_neg()
    storage = held.untyped_storage()
    seen[storage.data_ptr()] = uses = seen.get(storage.data_ptr(), 0) + 1
    # The reader refuses overlapping elements and tensors that are together much larger than the
    # file. torch.save would write the whole storage of a small view.
    if held.numel() * held.element_size() != storage.nbytes() or uses > MOST_SHARED:
        return held.clone()
    return held
