"""The network on trial: its images, and the attacks on them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fastadv.engine.model.network import Network
from fastadv.engine.model.outputs import Output
from fastadv.evaluation.attacks import attack
from fastadv.evaluation.attacks.pgd_loop import ce
from fastadv.evaluation.attacks.problem import Loss, Problem
from fastadv.evaluation.search.passes import Passes
from fastadv.threat import Threat

GRADIENT = 3  # a forward and a backward pass cost as much as three forward passes


class Attacked(NamedTuple):
    """Adversarial images ``x`` (n,C,H,W), their ``logits`` (n,classes), and where these are still
    ``right``, (n,) bool."""

    x: Tensor
    logits: Tensor
    right: Tensor


@dataclass
class Trial:
    """A network and the n images ``x`` with labels ``y`` and rows ``index`` that it classifies
    correctly, out of ``total``; ``logits`` are those of the images.

    ``standing`` (n,) bool: no gradient attack so far has fooled the network. ``spent`` counts
    passes of single images, a gradient as ``GRADIENT`` of them. ``other``: a second network, whose
    adversarial images are tried on the first.
    """

    model: nn.Module
    net: Network
    threat: Threat
    x: Tensor
    y: Tensor
    index: Tensor
    logits: Tensor
    total: int
    batch: int
    seed: int
    amp: bool | str = False
    output: Output = None
    other: nn.Module | None = None
    progress: Callable[[int], None] = lambda spent: None
    spent: int = 0
    standing: Tensor = field(init=False)

    def __post_init__(self) -> None:
        self.standing = torch.ones(len(self.x), dtype=torch.bool, device=self.x.device)
        self._named: dict[str, Attacked] = {}

    @property
    def coarse(self) -> bool:
        """True if the network computes in a type of 16 bits."""
        types = {parameter.dtype for parameter in self.model.parameters()}
        return not {self.net.outer_dtype, *types}.isdisjoint({torch.float16, torch.bfloat16})

    def __len__(self) -> int:
        return len(self.x)

    def seen(self, x: Tensor) -> Tensor:
        """Logits (n,classes) of ``x`` (n,C,H,W)."""
        return logits_of(self.net, x, self.batch, self._spend)

    def gradient(self, x: Tensor, loss: Loss = ce) -> tuple[Tensor, Tensor]:
        """The gradient (n,C,H,W) of ``loss`` at ``x``, and the logits there."""
        found = []
        with Passes(self.net):
            for rows in self._chunks(len(x)):
                problem = Problem(
                    self.net, self.threat, x[rows], self.y[rows], self.index[rows], self.seed
                )
                found.append(problem.gradient(x[rows], loss))
                self._spend(GRADIENT * len(x[rows]))
        gradients, logits = zip(*found, strict=True)
        return torch.cat(gradients), torch.cat(logits)

    def attacked(
        self,
        name: str,
        passes: int,
        threat: Threat | None = None,
        rows: Tensor | None = None,
        model: nn.Module | None = None,
        **options: Any,
    ) -> Attacked:
        """The attack ``name``, which costs ``passes`` passes, on the images ``rows`` (None: all).

        ``threat`` None: that of the trial. With ``model`` the attack is on that network, whose
        passes are not counted, and the result is tried on this one.
        """
        chosen = torch.arange(len(self), device=self.x.device) if rows is None else rows
        parts = []
        for part in self._chunks(len(chosen)):
            some = chosen[part]
            adversarial = attack(
                self.model if model is None else model,
                self.x[some],
                self.y[some],
                name,
                threat=self.threat if threat is None else threat,
                seed=self.seed,
                index=self.index[some],
                amp=self.amp if model is None else False,
                output=self.output if model is None else None,
                **options,
            )
            self._spend((passes if model is None else 0) * len(some))
            parts.append(adversarial)
        x = torch.cat(parts) if parts else self.x[:0]
        return self.judged(x, self.y[chosen])

    def by_gradient(self, name: str, passes: int, **options: Any) -> Attacked:
        """A gradient attack on all images within the threat; what it fools no longer stands. The
        same name is attacked once."""
        if name not in self._named:
            found = self._named[name] = self.attacked(name, passes, **options)
            self.standing = self.standing & found.right
        return self._named[name]

    def judged(self, x: Tensor, y: Tensor) -> Attacked:
        """``x`` (n,C,H,W) with labels ``y``, seen by the network."""
        logits = self.seen(x) if len(x) else self.logits[:0]
        return Attacked(x, logits, logits.argmax(1) == y)

    def left(self) -> Tensor:
        """The places (m,) of the images that stand."""
        return self.standing.nonzero().squeeze(1)

    def _chunks(self, n: int) -> list[slice]:
        return [slice(first, first + self.batch) for first in range(0, n, self.batch)]

    def _spend(self, passes: int) -> None:
        self.spent += passes
        self.progress(self.spent)


def logits_of(
    net: Network, x: Tensor, batch: int, spend: Callable[[int], None] = lambda passes: None
) -> Tensor:
    """Logits (n,classes) of ``x`` (n,C,H,W), ``batch`` images at a time."""
    found = []
    with Passes(net) as passes:
        for first in range(0, len(x), batch):
            found.append(passes.logits(x[first : first + batch]))
            spend(len(found[-1]))
    return torch.cat(found)
