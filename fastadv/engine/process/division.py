"""The division of one batch among processes that compute what a single process would.

Every process holds the whole batch, its attack, its losses and the state of its samples. Only the
passes of the network are divided: each process computes those of its own rows, and the logits and
the input gradients of all are put together. So whatever a method computes over a batch (the largest
entries, weights with mean 1, a nuclear norm), every random number and everything that is kept is
that of the whole batch, in every process.

Four functions join the two kinds of computing:

- ``own_rows``: whole batch -> own rows; its gradient puts together those of all processes.
- ``all_rows``: own rows -> whole batch; its gradient takes the own rows.
- ``added_up``: the sum over the processes, and so is its gradient. For what every process has a
  share in: the statistics of BatchNorm (``engine/model/whole_norm.py``).
- ``for_own_rows``: a value that all processes have, for the use of own rows; its gradient is the
  sum over the processes.

The first two are each other's gradient, the third is its own, and the last and the sum that is its
gradient are each other's, so gradients of gradients need nothing more.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, distributed
from torch.nn import functional

from fastadv.engine.process import distributed as processes
from fastadv.errors import UserError


class Division:
    """The rows of a whole batch that this process takes: as many as the others, or one more.

    ``live`` is False while its rows stand in for none, in a batch of fewer images than processes.
    """

    def __init__(self) -> None:
        self.processes, self.rank = processes.world_size(), processes.rank()
        self.live = True
        self._in_doubt = False  # True after an error, which the other processes may not have met
        self._headers: Any = None  # the group of the host's messages

    def bounds(self, total: int, rank: int | None = None) -> tuple[int, int]:
        """The first of the own rows of ``total``, and the first after them."""
        rank = self.rank if rank is None else rank
        return total * rank // self.processes, total * (rank + 1) // self.processes

    def own_rows(self, x: Tensor) -> Tensor:
        """The own rows (b,...) of ``x`` (B,...). The first row of all stands in for none, since a
        network may not take an empty batch; ``all_rows`` then leaves it out."""
        low, high = self.bounds(len(x))
        self.live = high > low
        found: Tensor = _OwnRows.apply(x, self)
        return found

    def all_rows(self, own: Tensor, total: int) -> Tensor:
        """The rows (B,...) of all processes, B = ``total``, of which these have ``own`` (b,...)."""
        low, high = self.bounds(total)
        found: Tensor = _AllRows.apply(own.narrow(0, 0, high - low), total, self)
        return found

    def added_up(self, share: Tensor) -> Tensor:
        """The sum of ``share`` over all processes, in each of which the result is used by its own
        rows."""
        found: Tensor = _AddedUp.apply(share)
        return found

    def for_own_rows(self, whole: Tensor) -> Tensor:
        """``whole`` itself, which is the same in all processes, to be used by the own rows: its
        gradient is the sum over all."""
        found: Tensor = _ForOwnRows.apply(whole)
        return found

    @torch.no_grad()
    def add_up(self, gradients: Sequence[Tensor | None], like: Sequence[Tensor]) -> list[Any]:
        """The sums of ``gradients`` over all processes, in one message per dtype; ``like`` are the
        tensors that they belong to. None counts as zero, and stays if no process has one, which
        only a process without one waits to know."""
        if not gradients:
            return []
        absent = [gradient is None for gradient in gradients]
        device = like[0].device
        present = torch.tensor([not each for each in absent], device=device, dtype=torch.float32)
        filled = [
            torch.zeros_like(tensor) if gradient is None else gradient
            for gradient, tensor in zip(gradients, like, strict=True)
        ]
        sums: list[Tensor | None] = [None] * len(filled)
        for dtype in dict.fromkeys([present.dtype, *(each.dtype for each in filled)]):
            places = [place for place, each in enumerate(filled) if each.dtype == dtype]
            parts = [filled[place].reshape(-1) for place in places]
            flat = torch.cat([*parts, *([present] if dtype == present.dtype else [])])
            processes.add_up(flat)
            sizes = [len(part) for part in parts]
            pieces = flat[: sum(sizes)].split(sizes) if sizes else []
            for place, piece in zip(places, pieces, strict=True):
                sums[place] = piece.view(filled[place].shape)
            if dtype == present.dtype:
                present = flat[sum(sizes) :]
        if any(absent):
            somewhere = (present > 0).tolist()
            sums = [each if known else None for each, known in zip(sums, somewhere, strict=True)]
        return sums

    # -- the call of a user ---------------------------------------------------------------------

    @contextmanager
    def at_work(self) -> Iterator[None]:
        """Within this context nothing is averaged over the processes: each holds everything.

        If a call ended with an error, raises ``UserError`` in the next one unless all processes had
        sent equally many messages.
        """
        if self._in_doubt:
            if not processes.in_step_after_error():
                raise UserError(
                    "A call failed in one process while others were in the middle of it, so their "
                    "messages no longer fit together: end all processes, and resume the run."
                )
            self._in_doubt = False
        try:
            with processes.alone():
                yield
        except BaseException:
            self._in_doubt = True
            raise

    def put_together(self, given: Sequence[Tensor | None], also: object = None) -> list[Any]:
        """The whole batch, from the part that each process was given: tensors (b,...), of which b
        may differ between processes and be 0. ``also`` must be the same in all of them.

        Raises ``UserError`` in every process if the parts do not fit together.
        """
        present = [each for each in given if each is not None]
        kinds = [None if t is None else (str(t.dtype), *t.shape[1:]) for t in given]
        said = zlib.crc32(repr((kinds, also)).encode())
        sizes, words = self._told([len(present[0]), said])
        if len(set(words)) > 1:
            other = next(rank for rank, word in enumerate(words) if word != words[0])
            raise UserError(
                f"Process {other} gave its step other arguments than process 0: with bn='global' "
                "all give the same ones, with images of one shape and type."
            )
        return [None if each is None else self._together(each, sizes) for each in given]

    def _together(self, part: Tensor, sizes: list[int]) -> Tensor:
        most = max(sizes)
        # The layout stays: a message is contiguous, which channels_last images are the other way.
        last = part.dim() == 4 and part.is_contiguous(memory_format=torch.channels_last)
        last = last and not part.is_contiguous()
        turned = part.permute(0, 2, 3, 1) if last else part
        padded = _longer(turned, most)
        as_sent = padded.to(torch.uint8) if padded.dtype == torch.bool else padded
        every = processes.every_row(as_sent).to(part.dtype)
        whole = torch.cat([every[k * most : k * most + size] for k, size in enumerate(sizes)])
        return whole.permute(0, 3, 1, 2) if last else whole

    def _told(self, own: list[int]) -> list[list[int]]:
        """The numbers ``own`` of all processes, without waiting for a GPU."""
        if distributed.get_backend() == "gloo":
            found = processes.every_row(torch.tensor([own]))
        else:
            if self._headers is None:
                self._headers = distributed.new_group(backend="gloo")
            parts = [torch.zeros(1, len(own), dtype=torch.int64) for _ in range(self.processes)]
            distributed.all_gather(parts, torch.tensor([own]), group=self._headers)
            found = torch.cat(parts)
        return [list(column) for column in zip(*found.tolist(), strict=True)]

    def __deepcopy__(self, memo: Any) -> Division:
        return Division()  # a group cannot be copied

    def __reduce__(self) -> Any:
        return Division, ()


def _longer(part: Tensor, rows: int) -> Tensor:
    """``part`` (b,...) with zeros up to ``rows`` rows."""
    missing = rows - len(part)
    return torch.cat([part, part.new_zeros(missing, *part.shape[1:])]) if missing else part


class _OwnRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, division: Division) -> Tensor:
        ctx.total, ctx.division = len(x), division
        low, high = division.bounds(len(x))
        return (x[low:high] if high > low else x[:1]).clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return ctx.division.all_rows(gradient, ctx.total), None


class _AllRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, own: Tensor, total: int, division: Division) -> Tensor:
        ctx.division = division
        bounds = [division.bounds(total, rank) for rank in range(division.processes)]
        return division._together(own, [high - low for low, high in bounds])

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        division = ctx.division
        low, high = division.bounds(len(gradient))
        own: Tensor = _OwnRows.apply(gradient, division)
        return own.narrow(0, 0, high - low), None, None


class _AddedUp(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, share: Tensor) -> Tensor:
        return _sum(share)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        return _AddedUp.apply(gradient)


class _ForOwnRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, whole: Tensor) -> Tensor:
        return whole.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        return _SumOfOwnRows.apply(gradient)


class _SumOfOwnRows(torch.autograd.Function):
    """The sum of what the own rows have, for what all processes compute alike: that is counted
    once, so the gradient for each is the given one, and not its sum over the processes."""

    @staticmethod
    def forward(ctx: Any, own: Tensor) -> Tensor:
        return _sum(own)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        return _ForOwnRows.apply(gradient)


def _sum(own: Tensor) -> Tensor:
    """A new tensor: the sum of ``own`` over all processes."""
    total = own.clone(memory_format=torch.contiguous_format)
    processes.add_up(total)
    return total


def padded_slot(own: Tensor, slot: int, slots: int) -> Tensor:
    """``own`` (n,) as row ``slot`` of ``slots``, the others zero: (slots,n)."""
    return functional.pad(own[None], (0, 0, slot, slots - slot - 1))
