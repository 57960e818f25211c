"""What the steps of an epoch returned, and what the parts report at its end."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from fastadv.algorithms.contract import Reports
from fastadv.algorithms.plan import Plan
from fastadv.engine.process import distributed
from fastadv.errors import UserError

_COLUMNS = ("loss", "accuracy", "clean_accuracy", "grad_norm")


def percent(share: float) -> float:
    """``share`` as metrics.jsonl has it, to a ten-thousandth."""
    return round(100 * share, 4)


class EpochMetrics:
    """The metrics of the steps of one epoch, at most ``batches`` of them.

    They stay on ``device``, a row for each batch, so that nothing waits for it before the end of
    the epoch, and an epoch costs one launch for each batch.
    """

    def __init__(self, batches: int, device: torch.device) -> None:
        self._rows = torch.zeros(batches, len(_COLUMNS), device=device)
        self._absent = torch.full((), torch.nan, device=device)
        self._images: list[int] = []  # of each batch, in this process
        self._before: list[int] = []  # of the batches before a resume, in all processes
        self._reports: dict[str, float] = {}

    def add(self, metrics: Mapping[str, Tensor], images: int) -> None:
        """Note the ``metrics`` of a step on ``images`` images."""
        values = [metrics.get(name, self._absent) for name in _COLUMNS]
        torch.stack(values, out=self._rows[self._count])
        self._images.append(images)

    @property
    def _count(self) -> int:
        return len(self._before) + len(self._images)

    def _all_images(self) -> Tensor:
        """The images (batches,) of all processes in each batch; all must call it."""
        own = torch.tensor(self._images, dtype=torch.float64, device=self._rows.device)
        if self._images:
            distributed.add_up(own)
        return torch.cat([torch.tensor(self._before, dtype=torch.float64), own.cpu()])

    def ask(self, plan: Plan) -> None:
        """Note what the parts of ``plan`` report; waits for the device."""
        self._reports = {
            f"{slot}/{name}": float(value)
            for slot, part in plan.parts.items()
            if isinstance(part, Reports)
            for name, value in part.report().items()
        }

    def line(self) -> dict[str, float]:
        """The numbers of the epoch, for metrics.jsonl; waits for the device. All processes call it.

        ``loss`` is the mean over the batches and ``train_accuracy_percent`` over the images, as
        they were trained on (attacked; a soft label counts as its largest entry).
        ``train_accuracy_clean_percent`` is that before the attack, where the loss forwards these
        images too. ``grad_norm`` is the mean over the batches, before any clipping, and
        ``grad_norm_max`` the largest; those of updates that a loss scale skipped are left out. What
        no step returned is left out too.
        """
        table = self._rows[: self._count].double().cpu()
        loss, accuracy, clean, norms = table.unbind(1)
        found = {"loss": float(loss.mean())}
        images = self._all_images()
        shares = {"train_accuracy_percent": accuracy, "train_accuracy_clean_percent": clean}
        for name, share in shares.items():
            if not share.isnan().any():
                found[name] = percent(float(share @ images / images.sum()))
        norms = norms[norms.isfinite()]
        if len(norms):
            found |= {"grad_norm": float(norms.mean()), "grad_norm_max": float(norms.max())}
        return found | self._reports

    def loss(self) -> float:
        """The mean loss so far; waits for the device."""
        return float(self._rows[: self._count, 0].double().mean())

    def clear(self) -> None:
        """Forget the epoch."""
        self._images, self._before, self._reports = [], [], {}

    def state(self) -> dict[str, Any]:
        """What a checkpoint within the epoch holds of it. All processes call it."""
        rows = self._rows[: self._count].clone()
        return {"rows": rows, "images": self._all_images().long(), "reports": self._reports}

    def load_state(self, saved: Any) -> None:
        """Continue from ``state``. Raises ``UserError`` for anything else."""
        try:
            self._images, self._before = [], saved["images"].tolist()
            self._rows[: self._count].copy_(saved["rows"])
            self._reports = dict(saved["reports"])
        except (KeyError, TypeError, ValueError, AttributeError, RuntimeError) as error:
            raise UserError(
                f"The checkpoint's metrics of its epoch do not belong to this run ({error}): "
                "restore the run's own last.pt."
            ) from None
