"""A probing forward pass leaves no trace in the Python state of the model.

Some models change in their first forward pass: scales are initialised from the first batch, caches
take its size, counters count it. A probe must not be that first pass.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.jit import ScriptModule

_HOLDERS = (dict, list, set, OrderedDict)


@contextmanager
def untouched(model: nn.Module) -> Iterator[None]:
    """On exit the modules of ``model`` have the same attributes, parameters and buffers as before,
    their lists, dicts and sets the same items, and their parameters the same values.

    Changes inside of other objects are not undone.
    """
    own = [vars(module) for module in model.modules() if not isinstance(module, ScriptModule)]
    holders: dict[int, Any] = {id(found): found for found in own}
    for attributes in own:
        holders |= {id(found): found for found in attributes.values() if type(found) in _HOLDERS}
    items = [(holder, holder.copy()) for holder in holders.values()]
    weights = [(p, p.data, p.detach().clone()) for p in model.parameters()]
    try:
        yield
    finally:
        for holder, before in items:
            if isinstance(holder, list):
                holder[:] = before
            else:
                holder.clear()
                holder.update(before)
        with torch.no_grad():
            for parameter, data, values in weights:
                if parameter.data_ptr() != data.data_ptr():
                    parameter.data = data
                if not torch.equal(data, values):
                    data.copy_(values)
