"""A method as bench names it: ``pgd``, or with options ``pgd:attack_bn=eval:steps=7``."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from fastadv.algorithms.contract.passes import Pass
from fastadv.algorithms.cost import passes
from fastadv.algorithms.plan import Plan
from fastadv.algorithms.recipes.table import METHODS
from fastadv.algorithms.resolution import resolve
from fastadv.declared import coerce
from fastadv.engine.model.fused_norm_choice import FusedNorm
from fastadv.errors import UserError

# A step is timed with every part at work. RWP moves the weights while some sample is easy, which
# random images never are: with every sample easy each step is the longest there is, and the same
# on every machine. Published strengths of double backward tear a network apart that is fitted to
# random labels; the work is the same at any.
AT_WORK: Mapping[str, Any] = {
    "c_min": 1e9, "warmup_epochs": 0, "te_start": 0, "te_end": 0, "sat_start": 0, "gairat_start": 0,
    "attack_start": 0, "reg_weight": 0.01,
}  # fmt: skip


@dataclass(frozen=True)
class Spec:
    """A method and the options that differ from its own; ``fused_norm`` is the step's setting."""

    method: str
    options: tuple[tuple[str, str], ...] = ()
    fused_norm: str = "auto"

    @classmethod
    def parse(cls, text: str) -> Spec:
        """Read ``name`` or ``name:option=value:option=value``."""
        method, *settings = text.strip().split(":")
        for setting in settings:
            if "=" not in setting:
                raise UserError(
                    f"Cannot read {setting!r} in {text!r}; options are written as "
                    "pgd:attack_bn=eval:steps=7."
                )
        pairs = [(name, value) for name, _, value in (each.partition("=") for each in settings)]
        fused = next((value for name, value in pairs if name == "fused_norm"), "auto")
        options = tuple(pair for pair in pairs if pair[0] != "fused_norm")
        spec = cls(method, options, coerce("fused_norm", fused, FusedNorm))
        spec.plan()  # report an unknown name now, not after minutes of timing
        return spec

    def __str__(self) -> str:
        pairs = [*self.options]
        pairs += [] if self.fused_norm == "auto" else [("fused_norm", self.fused_norm)]
        return ":".join([self.method, *(f"{name}={value}" for name, value in pairs)])

    def with_norm(self, fused_norm: str) -> Spec:
        """The same method with another setting of ``fused_norm``."""
        return replace(self, fused_norm=fused_norm)

    @property
    def is_the_peers(self) -> bool:
        """True if this is the method of every peer, PGD-10 AT, in any mode of BatchNorm."""
        return self.method == "pgd" and {name for name, _ in self.options} <= {"attack_bn"}

    @property
    def chosen(self) -> dict[str, Any]:
        """All options of the step."""
        known = resolve(self.method, dict(self.options), taken=("fused_norm",)).options
        return {name: value for name, value in AT_WORK.items() if name in known} | dict(
            self.options
        )

    def plan(self) -> Plan:
        """The method resolved."""
        return resolve(self.method, self.chosen)


def parse_specs(text: str) -> list[Spec]:
    """Methods separated by commas; "all" is every recipe."""
    if text.strip() == "all":
        return [Spec(method) for method in METHODS]
    return [Spec.parse(entry) for entry in text.split(",") if entry.strip()]


def passes_of(plan: Plan) -> Counter[Pass] | None:
    """The passes of one step, all updates of a batch together.

    None where their number depends on the data: RWP below the bench's own c_min stops early when
    no sample is easy any more.
    """
    if plan.slots["weights"] == "rwp" and float(plan.options["c_min"]) < AT_WORK["c_min"]:
        return None
    found = passes(plan).counts
    return Counter({entry: count * plan.updates_per_batch for entry, count in found.items()})
