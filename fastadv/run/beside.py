"""The verdicts of an evaluation beside those of the canonical AutoAttack on the same images."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import zip_longest

import torch
from torch import nn

from fastadv.declared import parse_number
from fastadv.engine.process.device import choose_device
from fastadv.errors import UserError
from fastadv.evaluation.reference import (
    CANONICAL,
    accuracies,
    attacks_of,
    canonical,
    require_package,
)
from fastadv.evaluation.scores import Scores
from fastadv.evaluation.search.catalogue import CASCADES
from fastadv.run.config import RunConfig
from fastadv.run.source import Source
from fastadv.threat import Threat


@dataclass(frozen=True)
class Beside:
    """One attack on ``n`` images: for each of its stages, in their order, the name and the robust
    accuracy in [0,1] after it, ours and the canonical one (None: a stage that it has not).
    ``only_ours`` and ``only_canonical``: numbers of images that are right under one of them alone.
    ``seconds``: what the canonical attacks took. ``remarks``: the package's warnings."""

    attack: str
    n: int
    stages: list[tuple[str, float, float | None]]
    only_ours: int
    only_canonical: int
    seconds: float
    remarks: tuple[str, ...]


def referenced(attacks: str) -> list[str]:
    """Those of ``attacks`` (with commas) that the canonical package knows. Raises ``UserError`` if
    it knows none, or is not installed."""
    require_package()
    found = []
    for name in (name.strip() for name in attacks.split(",")):
        with suppress(UserError):
            attacks_of(name)
            found.append(name)
    if not found:
        raise UserError(
            f"--reference compares AutoAttack and its attacks, and there is none in {attacks!r}: "
            f"name one of {', '.join(CASCADES)}, or of {', '.join(CANONICAL)} without numbers."
        )
    return found


def beside_canonical(
    loaded: tuple[RunConfig, Source, nn.Module],
    scores: Scores,
    attacks: Sequence[str],
    *,
    eps: str | None,
    limit: int | None,
    seed: int,
) -> list[Beside]:
    """``scores`` of the network ``loaded`` beside what the canonical package finds on the same
    images under each of ``attacks`` (``referenced``), with the same seed."""
    config, data, model = loaded
    images = data.test.limited(limit)
    threat = Threat(config.norm, config.eps if eps is None else parse_number(eps, "eps"))
    model = model.to(choose_device(config.device))
    found = []
    for name in attacks:
        verdicts = scores.verdicts.get(name)
        if verdicts is None:
            continue  # its time ran out
        theirs = canonical(model, images, name, threat=threat, seed=seed)
        ours = accuracies(verdicts.stages, torch.from_numpy(verdicts.fooled_by))
        pairs = zip_longest(ours.items(), theirs.accuracies.values())
        stages = [(stage, own, other) for (stage, own), other in pairs]
        right = torch.from_numpy(verdicts.right)
        others_right = (theirs.fooled_by < 0)[images.rows.argsort()]
        found.append(
            Beside(
                name,
                len(right),
                stages,
                int((right & ~others_right).sum()),
                int((~right & others_right).sum()),
                theirs.seconds,
                theirs.remarks,
            )
        )
    return found
