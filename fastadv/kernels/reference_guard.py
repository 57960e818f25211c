"""The guard around an update, in plain PyTorch: what is not finite, which fault is the first, what
is put back, and whether a batch is in range. No function waits for the device."""

from collections.abc import Sequence

import torch
from torch import Tensor

from .reference import check_pairs
from .rows import per_sample

EDGE = 1e-3  # share of eps by which rounding may leave a pixel inside of the ball


@torch.no_grad()
def not_finite(tensors: Sequence[Tensor], before: Sequence[Tensor] | None = None) -> Tensor:
    """True (0-dim bool) if a value of ``tensors``, floating and at least one, is not finite.

    With ``before``, tensors of the same shapes and dtypes, only where the value there is finite.
    Raises ``ValueError`` if they differ.
    """
    if before is None:
        some = [tensor for tensor in tensors if tensor.numel()]
        if not some:
            return torch.zeros((), dtype=torch.bool, device=tensors[0].device)
        # The largest of the absolute values is finite if all are; few launches for a whole list.
        return ~torch.stack(torch._foreach_norm(some, torch.inf)).isfinite().all()
    check_pairs(tensors, before)
    found = []
    for now, then in _by_dtype(tensors, before):
        found.append((_joined(then).isfinite() & ~_joined(now).isfinite()).any())
    return found[0] if len(found) == 1 else torch.stack(found).any()


def _by_dtype(
    first: Sequence[Tensor], second: Sequence[Tensor]
) -> list[tuple[list[Tensor], list[Tensor]]]:
    """Both lists in pieces of one dtype, which take few launches."""
    places: dict[torch.dtype, list[int]] = {}
    for place, tensor in enumerate(first):
        places.setdefault(tensor.dtype, []).append(place)
    return [([first[i] for i in own], [second[i] for i in own]) for own in places.values()]


def _joined(tensors: Sequence[Tensor]) -> Tensor:
    return torch.cat([tensor.reshape(-1) for tensor in tensors])


@torch.no_grad()
def put_back_unless(tensors: Sequence[Tensor], copies: Sequence[Tensor], ok: Tensor) -> None:
    """In place: ``tensors`` become ``copies``, bit for bit, unless ``ok`` (0-dim bool) is true.

    Both are lists of the same shapes and dtypes. Raises ``ValueError`` if they differ.
    """
    check_pairs(tensors, copies)
    for now, then in _by_dtype(tensors, copies):
        kept = torch.where(ok, _joined(now), _joined(then)).split([each.numel() for each in now])
        values = [value.view(own.shape) for value, own in zip(kept, now, strict=True)]
        torch._foreach_copy_(now, values)


@torch.no_grad()
def record_fault(
    bad_step: Tensor,
    kind: Tensor,
    update: Tensor,
    signs: Sequence[Tensor | None],
    recorded: Sequence[bool],
    ok: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Record the first bad update, and say if this one counts: (true if it does, 0-dim bool; 1.0 if
    not, else 0.0, 0-dim float32).

    ``signs`` has an entry per kind of fault, in the order in which they are named: a 0-dim bool
    that is true if there is such a fault, a 0-dim number whose fault is not to be finite, or None.
    If one with ``recorded`` shows a fault, there was none so far (``bad_step`` < 0) and ``ok``
    (0-dim bool; None: true), ``bad_step`` becomes ``update`` and ``kind`` its place, in place; all
    three are 0-dim int64. The update counts if ``ok``, if there is no fault of any kind, and if
    none was ever recorded.
    """
    nothing = torch.zeros((), dtype=torch.bool, device=bad_step.device)
    bad = torch.stack([nothing if sign is None else shows_fault(sign) for sign in signs])
    if all(recorded):
        known = bad
    else:
        pairs = zip(bad.unbind(), recorded, strict=True)
        known = torch.stack([each if counts else nothing for each, counts in pairs])
    first = known.any() & (bad_step < 0)
    first = first if ok is None else first & ok
    kind.copy_(torch.where(first, known.to(torch.uint8).argmax(), kind))
    bad_step.copy_(torch.where(first, update, bad_step))
    fine = (bad_step < 0) & ~bad.any()
    fine = fine if ok is None else fine & ok
    return fine, (~fine).float()


def shows_fault(sign: Tensor) -> Tensor:
    """A 0-dim bool as it is, or true for a 0-dim number that is not finite."""
    return ~sign.isfinite() if sign.is_floating_point() else sign


@torch.no_grad()
def look_at_batch(
    x: Tensor,
    y: Tensor | None,
    rows: Tensor | None,
    box: tuple[float, float],
    rounding: float,
    classes: int,
    first_row: int,
    row_count: int,
    bad: Sequence[Tensor],
    homes: Sequence[Tensor | None] = (None, None, None),
) -> tuple[Tensor, Tensor | None, Tensor]:
    """(``x``, ``y``, ``rows``) clipped to their ranges; ``bad`` says if they were in them.

    ``x`` (B,...) are images in ``box`` = [low, high], ``y`` (B,) int64 labels in [0, ``classes``),
    ``rows`` (B,) int64 in [0, ``row_count``); rows that are None are numbered from ``first_row``.
    The three 0-dim bools ``bad`` are set in place: true if a pixel is outside of the box by more
    than ``rounding`` or not a number, if a label is out of range, if a row is. NaN stays NaN. The
    results are written to ``homes``, which are of their shapes, dtypes and layouts; to new memory
    where it is None.
    """
    low, high = box
    images, labels, numbers = bad
    if rows is None:
        rows = torch.arange(first_row, first_row + len(x), device=x.device)
    images.copy_(~((x >= low - rounding) & (x <= high + rounding)).all())
    if y is None:
        labels.fill_(False)
    else:
        labels.copy_(((y < 0) | (y >= classes)).any())
        y = y.clamp(0, classes - 1)
    numbers.copy_(((rows < 0) | (rows >= row_count)).any())
    x_home, y_home, rows_home = homes
    in_range = rows.clamp(0, row_count - 1)
    if y is not None and y_home is not None:
        y = y_home.copy_(y)
    return (
        x.clamp(low, high) if x_home is None else x_home.copy_(x.clamp(low, high)),
        y,
        in_range if rows_home is None else rows_home.copy_(in_range),
    )


@torch.no_grad()
def unmoved_images(
    x_adv: Tensor,
    start: Tensor,
    x: Tensor,
    eps: float | Tensor,
    low: float = 0.0,
    high: float = 1.0,
) -> Tensor:
    """True for each image (B,) of which an attack in Linf that began at ``start`` moved no pixel,
    though its steps need not all have pointed out of the ball.

    ``x_adv``, ``start`` (clipped to [low, high] here) and ``x``, the centre, are (B,...) of one
    dtype; ``eps`` is a number, a 0-dim tensor or (B,). An image rests at the edge, and is not
    counted, if a pixel is at the distance eps and none can move in both directions; a thousandth of
    eps is left to rounding. Raises ``ValueError`` for an ``eps`` of another shape.
    """
    radius = per_sample("eps", eps, x, x.dtype)
    if isinstance(radius, Tensor):
        radius = radius.to(x.dtype)  # compared as a number is
    start = start.clamp(low, high)
    out = (start - x).abs() >= radius * (1 - EDGE)
    stuck = out | (start <= low) | (start >= high)
    edge = out.flatten(1).any(1) & stuck.flatten(1).all(1)
    return (x_adv == start).flatten(1).all(1) & ~edge
