"""Attacks that are searches, alone or in a cascade, on one batch."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from fastadv.errors import warn
from fastadv.evaluation.attacks.masks import masks_of
from fastadv.evaluation.attacks.names import AttackSpec, parse_attack
from fastadv.evaluation.attacks.problem import Problem
from fastadv.evaluation.counts import Counts, by_square
from fastadv.evaluation.search import cascade
from fastadv.evaluation.search.cascade import Stage
from fastadv.evaluation.search.catalogue import SEARCHES, SECOND_OPINION
from fastadv.evaluation.search.passes import Passes
from fastadv.evaluation.search.rows import Rows, joined
from fastadv.evaluation.search.search import Images, Search
from fastadv.threat import Threat


def check(spec: AttackSpec, threat: Threat) -> None:
    """Raise ``UserError`` if a search of ``spec`` cannot be made in ``threat``."""
    for part in spec.searches:
        SEARCHES[part.kind].check(threat, part.name)


def stages_of(
    spec: AttackSpec, threat: Threat, seed: int, classes: int, *, again: bool
) -> list[Stage]:
    """The searches of ``spec`` on a network of ``classes``, in their order; with ``again`` those of
    a cascade are followed by some in the network's own precision."""
    stages = [Stage(_search(part, threat, seed, classes), name=part.name) for part in spec.searches]
    if again and spec.kind == "cascade":
        for name in SECOND_OPINION:
            part = parse_attack(name)
            kind = SEARCHES[part.kind]
            if classes >= kind.least_classes and not (threat.targeted and kind.aims):
                stages.append(Stage(_search(part, threat, seed, classes), exact=True, name=name))
    return stages


def _search(part: AttackSpec, threat: Threat, seed: int, classes: int) -> Search:
    kind = SEARCHES[part.kind]
    options = {name: getattr(part, name) for name in kind.options}
    return kind.of(threat, seed, classes, part.steps, part.restarts, **options)


def numbered(names: Iterable[str]) -> list[str]:
    """``names``, each once: those that come again with a number."""
    counted: Counter[str] = Counter()
    found = []
    for name in names:
        counted[name] += 1
        found.append(name if counted[name] == 1 else f"{name} ({counted[name]})")
    return found


def searched(passes: Passes, problem: Problem, spec: AttackSpec) -> Tensor:
    """The adversarial example of each image of ``problem``, or the point of the smallest margin
    that was seen where none was found; an image that is wrong without an attack stays as it is.
    Warns as ``fastadv.evaluate`` does of what makes the attack too weak."""
    x, threat = problem.x, problem.threat
    passes.prepare(x)
    with torch.no_grad():
        logits = problem.logits(x)
    masks = masks_of(problem, logits)
    stages = stages_of(spec, threat, problem.seed, logits.shape[1], again=passes.confirms)
    images = Images(x, problem.y, problem.index, logits)
    place = torch.arange(len(x), device=x.device)
    rows = cascade.entering(images, place, targeted=threat.targeted)
    found = joined(cascade.run(stages, iter([rows]), passes, len(x)))
    names = ["clean", *(stage.name for stage in stages)]
    for sentence in _counts(spec.name, names, found, masks).remarks():
        warn(sentence)
    result = x.clone()
    result[found["place"]] = found["found"]
    return result


def _counts(name: str, stages: Sequence[str], found: Rows, masks: Sequence[Tensor]) -> Counts:
    """The counts of an attack on one batch. Waits for the device."""
    right = ~found["fooled"]
    flat, fooled_by = (right & found["flat"]).sum(), found[cascade.FOOLED_BY].cpu().numpy()
    return Counts(
        [name], len(right), [int(right.sum())], [int(flat)], [0],
        [by_square(stages, fooled_by)], [bool(mask) for mask in masks],
    )  # fmt: skip
