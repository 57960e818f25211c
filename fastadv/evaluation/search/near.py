"""Forward passes at points that differ from a known one in a small window.

Of the first part of the network (``local_part.py``) only a window is computed again: the pixels
around it come from the maps of the known point, which are kept. From where the maps become smaller
the pass is a usual one. The results are those of a whole pass up to rounding, and errors do not add
up: every map that is kept was computed from kept maps of the layer before.

Square attack asks for thousands of such points, most of which change a few pixels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fastadv.evaluation.search.local_part import LocalPart

Forward = Callable[[Tensor], Tensor]
WORTH = 0.08  # of the multiplications of a pass must be saved, which its copies cost at most
MOST_BYTES = 2**30  # of kept maps
FEW = 8  # rows, or a quarter of them, do not pay for a pass of their own
STEP = 2  # sizes of windows are rounded up to multiples
LOOK_EVERY = 100  # calls, one image is also computed as a whole
SAME = 1e-3  # so far apart are equal logits, relative to the largest
CHECKED = 4  # windows
AGREES = 1e-4  # of the change in the logits: rounding is far below it, what is not local above it


class _Windows(NamedTuple):
    """Square windows with ``side`` and first rows ``top`` and columns ``left`` (n,)."""

    top: Tensor
    left: Tensor
    side: int

    def of(self, rows: Tensor) -> _Windows:
        return _Windows(self.top[rows], self.left[rows], self.side)

    def places(
        self, images: Tensor, size: Sequence[int], around: int = 0, *, wide: bool = True
    ) -> Tensor:
        """The numbers (n * side'^2,) of the pixels of the windows in maps (images,H,W,C) of
        ``size`` (H,W) with ``around`` more pixels on every side, for the maps number ``images``
        (n,). With ``wide`` so many pixels on every side of a window are among them."""
        height, width = (n + 2 * around for n in size)
        reach = torch.arange(self.side + 2 * around) if wide else torch.arange(self.side) + around
        rows = (images * height + self.top)[:, None] + reach
        columns = self.left[:, None] + reach
        return (rows[:, :, None] * width + columns[:, None]).flatten()


class _Asked(NamedTuple):
    """Points (n,C,H,W) that were asked about last, with what was computed in their windows."""

    slots: Tensor
    point: Tensor
    windows: _Windows
    patches: dict[nn.Module, Tensor]


class Near:
    """The passes of one network for images (C,H,W) of ``shape`` and ``dtype``, at most ``slots`` at
    a time.

    ``forward``: logits (n,classes) of (n,C,H,W), without gradients.
    """

    def __init__(
        self,
        part: LocalPart,
        forward: Forward,
        shape: tuple[int, int, int],
        dtype: torch.dtype,
        slots: int,
    ) -> None:
        self.part, self.forward, self.size = part, forward, shape[1:]
        self._maps: dict[nn.Module, Tensor] = {}  # (slots * H' * W',C): what enters a module
        self._same: dict[nn.Module, nn.Module] = {}  # one that the same maps enter, before it
        self._base = torch.zeros(slots, *shape, dtype=dtype)
        self._known = torch.zeros(slots, dtype=torch.bool)
        self._slot: dict[int, int] = {}
        self._free = list(range(slots))
        self._asked: list[_Asked] = []
        self.works = True  # False: every pass is a whole one
        self._calls = 0

    def logits(self, point: Tensor, known: Tensor, place: Tensor) -> Tensor:
        """Logits (n,classes) of ``point`` (n,C,H,W). ``known`` (n,C,H,W): the points of which maps
        are to be kept, as they will be asked about again and again; ``place`` (n,) int64: which
        image it is.

        One image in some hundred calls is also computed as a whole: a model that acts otherwise on
        some images gets whole passes from then on, as does one that fails in a window.
        """
        if self.works:
            self._calls += 1
            try:
                found = self._logits(point, known, place)
                if self._calls % LOOK_EVERY or self._is_whole(found, point):
                    return found
            except Exception:  # an error of the model comes again below
                pass
            self.works = False
            self._maps.clear()
            self._asked = []
        return self.forward(point)

    def _is_whole(self, found: Tensor, point: Tensor) -> bool:
        """True if the logits ``found`` of one of the images are those of a whole pass."""
        row = (self._calls // LOOK_EVERY) % len(point)
        whole = self.forward(point[row : row + 1])[0]
        return bool((found[row] - whole).abs().max() <= SAME * whole.abs().max())

    def _logits(self, point: Tensor, known: Tensor, place: Tensor) -> Tensor:
        slots = self._slots(place)
        self._take_over(known, slots)
        windows, needed = self._windows(point, known)
        whole = ~self._pays(needed)
        self._keep(known, slots, (~whole & ~self._known[slots]).nonzero().squeeze(1))
        parts: list[Tensor] = []
        order: list[Tensor] = []
        rest = whole.nonzero().squeeze(1)
        if len(rest):
            parts.append(self.forward(point[rest]))
            order.append(rest)
        for side, rows in self._groups(needed, whole):
            parts.append(self._in_windows(point[rows], slots[rows], windows(rows, side)))
            order.append(rows)
        return torch.cat(parts)[torch.cat(order).argsort()]

    def _slots(self, place: Tensor) -> Tensor:
        """The slots (n,) of the images; those of images that have left are free."""
        places = place.tolist()
        for gone in self._slot.keys() - set(places):
            slot = self._slot.pop(gone)
            self._known[slot] = False
            self._free.append(slot)
        for each in places:
            if each not in self._slot:
                self._slot[each] = self._free.pop()
        return torch.tensor([self._slot[each] for each in places])

    def _take_over(self, known: Tensor, slots: Tensor) -> None:
        """Where a point that was asked about last is now the known one, keep its maps; where the
        known point is another one, forget them."""
        moved = (self._base[slots] != known).flatten(1).any(1)
        row = torch.full((len(self._base),), -1)
        row[slots] = torch.arange(len(slots))
        for asked in self._asked:
            at = row[asked.slots]
            same = (at >= 0) & moved[at] & (known[at] == asked.point).flatten(1).all(1)
            taken = same.nonzero().squeeze(1)
            if len(taken):
                self._write(asked, taken)
                moved[at[taken]] = False
        self._asked = []
        self._known[slots[moved]] = False

    def _write(self, asked: _Asked, rows: Tensor) -> None:
        slots, windows = asked.slots[rows], asked.windows.of(rows)
        for module, patch in asked.patches.items():
            at = windows.places(slots, self.size, self.part.around[module], wide=False)
            self._maps[module][at] = patch[rows].flatten(0, 2)
        self._base[slots] = asked.point[rows]

    def _windows(
        self, point: Tensor, known: Tensor
    ) -> tuple[Callable[[Tensor, int], _Windows], Tensor]:
        """What gives the windows of some rows with a side, and the side (n,) that is needed: where
        the points differ, and as far as that reaches. 0: they do not differ."""
        differs = (point != known).any(1)
        first, last = [], []
        for dim in (2, 1):
            lines = differs.any(dim).byte()
            first.append(lines.argmax(1))
            last.append(lines.shape[1] - 1 - lines.flip(1).argmax(1))
        extent = torch.stack([end - start for start, end in zip(first, last, strict=True)]).amax(0)
        radius = self.part.radius
        needed = torch.where(differs.any(2).any(1), extent + 1 + 2 * radius, 0)

        def windows(rows: Tensor, side: int) -> _Windows:
            top, left = (
                (start[rows] - radius).clamp(0, n - side)
                for start, n in zip(first, self.size, strict=True)
            )
            return _Windows(top, left, side)

        return windows, needed

    def _pays(self, side: Tensor) -> Tensor:
        """(n,) bool: whether a window of such a side saves enough."""
        height, width = self.size
        fits = (side > 0) & (side <= min(height, width))
        return fits & (self.part.share * (1 - side.square() / (height * width)) >= WORTH)

    def _groups(self, needed: Tensor, whole: Tensor) -> Iterator[tuple[int, Tensor]]:
        """Sides, and the rows whose windows have them."""
        rounded = (needed + STEP - 1) // STEP * STEP
        rounded = torch.where(self._pays(rounded), rounded, needed).masked_fill(whole, 0)
        few = max(FEW, len(needed) // 4)
        waiting: list[Tensor] = []
        rest = int((rounded > 0).sum())
        for side in sorted(set(rounded.tolist()) - {0}):
            waiting.append((rounded == side).nonzero().squeeze(1))
            rest -= len(waiting[-1])
            if rest == 0 or (rest >= few and sum(map(len, waiting)) >= few):
                yield side, torch.cat(waiting)
                waiting = []

    def _keep(self, known: Tensor, slots: Tensor, rows: Tensor) -> None:
        """Keep the maps of ``known`` for ``rows``, by a whole pass."""
        if not len(rows):
            return
        at = slots[rows]
        first: list[tuple[nn.Module, Tensor]] = []

        def entered(module: nn.Module, given: Tensor) -> None:
            for other, its in first:
                if its is given and self.part.around[other] == self.part.around[module]:
                    self._same[module] = other
                    return
            first.append((module, given))
            around = self.part.around[module]
            maps = self._map_of(module, given).view(len(self._base), *self._sizes(around), -1)
            end = -around or None
            maps[at, around:end, around:end] = given.permute(0, 2, 3, 1)

        with _reading(self.part, entered):
            self.forward(known[rows])
        self._base[at] = known[rows]
        self._known[at] = True

    def _sizes(self, around: int) -> tuple[int, int]:
        height, width = self.size
        return height + 2 * around, width + 2 * around

    def _map_of(self, module: nn.Module, given: Tensor) -> Tensor:
        if module not in self._maps:
            height, width = self._sizes(self.part.around[module])
            shape = (len(self._base) * height * width, given.shape[1])
            self._maps[module] = given.new_zeros(shape)  # zeros around the maps stay
        return self._maps[module]

    def _in_windows(self, point: Tensor, slots: Tensor, windows: _Windows) -> Tensor:
        """Logits of ``point`` (n,C,H,W), which is near the points in ``slots`` (n,)."""
        n, side = len(point), windows.side
        patches: dict[nn.Module, Tensor] = {}
        made: dict[nn.Module, Tensor] = {}
        read: dict[int, Tensor] = {}  # the places of windows, by the pixels around them

        def entering(module: nn.Module, given: Tensor) -> Tensor:
            same = self._same.get(module)
            if same is None:
                around = self.part.around[module]
                made[module] = inside(module, given, around) if around else end(module, given)
            return made[module if same is None else same]

        def inside(module: nn.Module, given: Tensor, around: int) -> Tensor:
            if around not in read:
                read[around] = windows.places(slots, self.size, around)
            wide = self._maps[module].index_select(0, read[around])
            wide = wide.view(n, side + 2 * around, side + 2 * around, -1)
            # What is kept is a copy, as the model may change in place what has entered a module.
            patches[module] = patch = wide[:, around:-around, around:-around]
            patch.copy_(given.permute(0, 2, 3, 1))
            return wide.permute(0, 3, 1, 2)

        def end(module: nn.Module, given: Tensor) -> Tensor:
            patches[module] = patch = given.permute(0, 2, 3, 1).clone()
            height, width = self.size
            maps = self._maps[module].view(len(self._base), height * width, -1)[slots].flatten(0, 1)
            maps[here] = patch.flatten(0, 2)
            return maps.view(n, height, width, -1).permute(0, 3, 1, 2)

        pixels = point.permute(0, 2, 3, 1).flatten(0, 2)
        here = windows.places(torch.arange(n), self.size)
        patch = pixels.index_select(0, here).view(n, side, side, -1).permute(0, 3, 1, 2)
        with _windowed(self.part, entering):
            logits = self.forward(patch)
        self._asked.append(_Asked(slots, point, windows, patches))
        return logits


def near(part: LocalPart, forward: Forward, x: Tensor, slots: int) -> Near:
    """Passes for at most ``slots`` images like ``x`` (n,C,H,W) at a time; see ``Near``."""
    channels, height, width = x.shape[1:]
    return Near(part, forward, (channels, height, width), x.dtype, slots)


def pays(part: LocalPart, x: Tensor, slots: int) -> bool:
    """True if small windows save enough for images like ``x`` (n,C,H,W), and the kept maps of
    ``slots`` images are not too large."""
    least = 1 + 2 * part.radius
    height, width = x.shape[2:]
    saved = part.share * (1 - least * least / (height * width))
    kept = slots * height * width * sum(part.channels.values()) * x.element_size()
    return least <= min(height, width) and saved >= WORTH and kept <= MOST_BYTES


def agrees(part: LocalPart, forward: Forward, x: Tensor) -> bool:
    """True if windows of noise in some images of ``x`` (n,C,H,W), and in noise, give the logits of
    whole passes, by values: the largest windows at the corners, where maps end, and inside; then
    the smallest ones within them, from the maps that were just computed; then all the way back.

    What looks at the whole map may not notice that a large window is not all of it, or may do
    something else with small ones."""
    generator = torch.Generator().manual_seed(0)
    x = x[torch.arange(CHECKED) * len(x) // CHECKED].clone()
    x[1::2] = torch.rand(x[1::2].shape, generator=generator).to(x)
    one = near(part, forward, x, CHECKED)
    height, width = x.shape[2:]
    side = max(1, min(height, width) - 2 * part.radius - 1)
    while side > 1 and not bool(one._pays(torch.tensor([side + 2 * part.radius]))):
        side -= 1
    large = x.clone()
    noise = torch.rand(x.shape[1], side, side, generator=generator).to(x)
    lowest, furthest = height - side, width - side
    corners = [(0, 0), (lowest, furthest), (lowest // 2, furthest // 3), (0, furthest)]
    for row, (top, left) in enumerate(corners):
        large[row, :, top : top + side, left : left + side] = noise
    small = large.clone()
    for row, (top, left) in enumerate(corners):
        middle = small[row, :, top + side // 2, left + side // 2]
        middle.copy_(1 - middle.round())
    place = torch.arange(CHECKED)
    known, before = x, forward(x)
    allowed = AGREES * (forward(large) - before).abs().amax(1)
    for point in (large, small, x):
        off = (one.logits(point, known, place) - forward(point)).abs().amax(1)
        if not bool((off <= allowed).all()):
            return False
        known = point
    return True


@contextmanager
def _reading(part: LocalPart, entered: Callable[[nn.Module, Tensor], None]) -> Iterator[None]:
    """Within this context ``entered`` gets what enters the modules of ``part``."""

    def hook(module: nn.Module, given: tuple[Any, ...]) -> None:
        entered(module, given[0])

    hooks = [module.register_forward_pre_hook(hook) for module in (*part.inside, *part.ends)]
    try:
        yield
    finally:
        for handle in hooks:
            handle.remove()


@contextmanager
def _windowed(part: LocalPart, entering: Callable[[nn.Module, Tensor], Tensor]) -> Iterator[None]:
    """Within this context the modules of ``part`` take what ``entering`` makes of what enters them:
    a window with the pixels around it inside, whole maps at its ends."""

    def hook(module: nn.Module, given: tuple[Any, ...]) -> tuple[Any, ...]:
        return entering(module, given[0]), *given[1:]

    hooks = [module.register_forward_pre_hook(hook) for module in (*part.inside, *part.ends)]
    paddings = [(module, module.padding) for module in part.inside]
    try:
        for module, _ in paddings:
            module.padding = (0, 0)
        yield
    finally:
        for module, padding in paddings:
            module.padding = padding
        for handle in hooks:
            handle.remove()
