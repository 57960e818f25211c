"""Saves and restores the values of many small tensors, above all BatchNorm's running statistics."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from operator import is_
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fastadv import kernels
from fastadv.engine.model.registries import Registries
from fastadv.engine.packing import FlatViews


class Place(NamedTuple):
    """The place of a buffer: ``registry[name]`` was ``tensor``."""

    registry: dict[str, Tensor | None]
    name: str
    tensor: Tensor

    def now(self) -> Tensor:
        """The tensor that is there now; a forward pass may have put another one there. If its shape
        or type differs, or there is none, ``tensor``."""
        found = self.registry.get(self.name)
        if found is self.tensor:
            return found
        same = found is not None and (found.shape, found.dtype) == (
            self.tensor.shape,
            self.tensor.dtype,
        )
        return found.detach() if found is not None and same else self.tensor

    def hang_back(self) -> None:
        """Put ``tensor`` back into its place."""
        if self.registry.get(self.name) is not self.tensor:
            self.registry[self.name] = self.tensor


def places(modules: Iterable[nn.Module]) -> list[Tensor | Place]:
    """The buffers of ``modules``, each once, with their places; those of TorchScript without, since
    they cannot be replaced."""
    found: dict[int, Tensor | Place] = {}
    for module in modules:
        registry = module._buffers
        for name, tensor in registry.items():
            if tensor is not None:
                plain = isinstance(registry, dict)
                place = Place(registry, name, tensor) if plain else tensor
                found.setdefault(id(tensor), place)
    return list(found.values())


def floating_buffers(model: nn.Module) -> dict[str, Tensor]:
    """Name -> present floating-point buffer, for all that ``model.state_dict()`` saves."""
    return {
        f"{prefix}.{name}".lstrip("."): tensor
        for prefix, module in model.named_modules()
        for name, tensor in module._buffers.items()
        if tensor is not None
        and tensor.is_floating_point()
        and name not in module._non_persistent_buffers_set
    }


class Layout:
    """The buffers that a snapshot saves, grouped by device and data type.

    ``buffers`` are tensors, or places in which a forward pass may put another tensor.
    """

    def __init__(self, buffers: Sequence[Tensor | Place]) -> None:
        self.places = [buffer for buffer in buffers if isinstance(buffer, Place)]
        self.place_of = {id(place.tensor): place for place in self.places}
        groups: dict[object, list[Tensor]] = {}
        for buffer in buffers:
            tensor = buffer.tensor if isinstance(buffer, Place) else buffer
            groups.setdefault((tensor.device, tensor.dtype), []).append(tensor)
        self.groups = list(groups.values())
        self._flat = [FlatViews() for _ in self.groups]

    def flat(self) -> list[Tensor]:
        """The present values of each group, in one tensor (n,)."""
        found = []
        for group, flat in zip(self.groups, self._flat, strict=True):
            flat.follow(group)
            found.append(torch.cat(flat.views) if flat.flat else _flat(group))
        return found


class ModelLayout:
    """The layout of a model's buffers, created again only if the model has other buffers."""

    def __init__(self) -> None:
        self._layout = Layout([])
        self._seen: list[Any] = []

    def of(self, registries: Registries, more: Sequence[Tensor]) -> Layout:
        """The layout of the buffers in ``registries`` and of the tensors ``more``."""
        if registries.scripts:  # whose dictionaries are made anew at every look
            return Layout([*places(registries.model.modules()), *more])
        tensors = [*registries.buffers(), *more]
        kinds = [None if tensor is None else tensor.dtype for tensor in tensors]
        seen = [registries, *registries.buffer_names(), *tensors, *kinds]
        if len(seen) != len(self._seen) or not all(map(is_, seen, self._seen)):
            self._layout = Layout([*places(registries.modules), *more])
            self._seen = seen
        return self._layout

    def __getstate__(self) -> dict[str, Any]:
        return vars(ModelLayout())  # a copy's model has other buffers


class Snapshot:
    """The values of buffers at one moment, joined in one tensor per device and data type.

    A network has dozens of small buffers. Joined, they are saved, selected and restored by a few
    launches instead of dozens, each of which costs as much as a launch on a large tensor.
    """

    @torch.no_grad()
    def __init__(self, layout: Layout) -> None:
        self._places, self._groups = layout.places, layout.groups
        self._at = layout.place_of
        self._values = layout.flat()

    @torch.no_grad()
    def put_back(self) -> None:
        """Restore the buffers: the same tensors with the same values."""
        for place in self._places:
            place.hang_back()
        for group, values in zip(self._groups, self._values, strict=True):
            _fill(group, values)

    @torch.no_grad()
    def not_finite(self) -> Tensor | None:
        """True (0-dim bool) if a value that was finite is not finite now; None without
        floating-point buffers. It must be None in all processes or in none, since they send their
        answers together."""
        groups = zip(self._groups, self._values, strict=True)
        found = []
        for group, values in groups:
            if not values.is_floating_point():
                continue
            now = self._now(group)
            if values.device.type == "cpu":
                found.append((values.isfinite() & ~_flat(now).isfinite()).any())
            else:
                found.append(kernels.not_finite(now, _parts(values, group)))
        if len(found) < 2:
            return found[0] if found else None
        return torch.stack(found).any()

    def _now(self, group: Sequence[Tensor]) -> list[Tensor]:
        found = []
        for tensor in group:
            place = self._at.get(id(tensor))
            stays = place is None or place.registry.get(place.name) is tensor
            found.append(tensor if stays or place is None else place.now())
        return found

    @torch.no_grad()
    def put_back_unless(self, ok: Tensor) -> None:
        """``put_back`` if ``ok`` (0-dim bool) is false, without waiting for the device. Otherwise
        the original tensors get the present values and return to their places."""
        tensors: list[Tensor] = []
        copies: list[Tensor] = []
        for group, values in zip(self._groups, self._values, strict=True):
            now = self._now(group)
            if values.device.type == "cpu":
                _fill(group, torch.where(ok, _flat(now), values))
                continue
            moved = [place for place, tensor in enumerate(group) if now[place] is not tensor]
            copy_into([group[place] for place in moved], [now[place] for place in moved])
            tensors += group
            copies += _parts(values, group)
        if tensors:
            kernels.put_back_unless(tensors, copies, ok)
        for place in self._places:
            place.hang_back()


def _flat(tensors: Sequence[Tensor]) -> Tensor:
    return torch.cat([t if t.dim() == 1 else t.reshape(-1) for t in tensors])


def _fill(tensors: Sequence[Tensor], values: Tensor) -> None:
    copy_into(tensors, _parts(values, tensors))


def _parts(values: Tensor, tensors: Sequence[Tensor]) -> list[Tensor]:
    """The pieces of ``values`` (n,) in the shapes of ``tensors``."""
    parts = values.split([tensor.numel() for tensor in tensors])
    return [part.view(tensor.shape) for part, tensor in zip(parts, tensors, strict=True)]


@contextmanager
def kept(layout: Layout) -> Iterator[None]:
    """On exit the buffers are the same tensors with the same values as before."""
    before = Snapshot(layout)
    try:
        yield
    finally:
        before.put_back()


@torch.no_grad()
def copy_into(tensors: Sequence[Tensor], values: Sequence[Tensor]) -> None:
    """Copy ``values`` into ``tensors`` in place; one launch if all have one data type."""
    if tensors:
        torch._foreach_copy_(list(tensors), list(values))
