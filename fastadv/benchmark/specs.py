"""A method as bench names it: ``pgd``, or with options ``pgd:attack_bn=eval:steps=7``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from fastadv.benchmark.geometry import FORWARD, INPUT_GRADIENT, TRAINING
from fastadv.errors import UserError
from fastadv.plan import Plan, resolve

# RWP moves the weights while some sample is easy, which random images never are: counting every
# sample makes each step the longest there is, and the same on every machine.
BENCH_OPTIONS: Mapping[str, Mapping[str, Any]] = {"rwp": {"c_min": 1e9}}


@dataclass(frozen=True)
class Spec:
    """A method and the options that differ from its own."""

    method: str
    options: tuple[tuple[str, str], ...] = ()

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
        pairs = [setting.split("=", 1) for setting in settings]
        spec = cls(method, tuple((name, value) for name, value in pairs))
        spec.plan()  # an unknown name is said now, not after minutes of timing
        return spec

    def __str__(self) -> str:
        return ":".join([self.method, *(f"{name}={value}" for name, value in self.options)])

    @property
    def is_the_peers(self) -> bool:
        """Whether this trains what every peer does, PGD-10 AT; BatchNorm's mode is free."""
        return self.method == "pgd" and {name for name, _ in self.options} <= {"attack_bn"}

    @property
    def chosen(self) -> dict[str, Any]:
        """Every option handed to the step."""
        return dict(BENCH_OPTIONS.get(self.method, {})) | dict(self.options)

    def plan(self) -> Plan:
        """The method resolved."""
        return resolve(self.method, self.chosen)


def parse_specs(text: str) -> list[Spec]:
    """Methods separated by commas."""
    return [Spec.parse(entry) for entry in text.split(",") if entry.strip()]


ONE_STEP = {"fgsm", "fgsm-r", "fgsm-n", "n-fgsm", "fast", "fgsm-plus", "apart"}
ONE_OUTER = {"ce", "trades", "clean-subtracted"}


def passes_of(plan: Plan) -> dict[str, int] | None:
    """How many passes of which kind one step needs, over batches of its own size.

    None for a recipe that is not only such passes (double backward, several updates a batch, a
    number of passes that depends on the data).
    """
    slots, options = plan.slots, plan.options
    gradients = _attack_gradients(slots["adversary"], options)
    regularizer = slots["regularizer"]
    if gradients is None or regularizer not in {"none", "advlc"}:
        return None
    if slots["objective"] not in ONE_OUTER or slots["target"] != "one-hot":
        return None
    weight_passes = {"none": 0, "awp": 1, "rwp": int(options.get("weight_steps", 0))}
    if slots["weights"] not in weight_passes or _depends_on_data(plan):
        return None
    networks = 2 if "natural_logits_train" in plan.needs else 1
    forwards = sum(need in plan.needs for need in ("natural_logits_eval", "natural_logits_attack"))
    if forwards == 2 and plan.adversary.attack_bn == "eval":
        forwards = 1  # both are the same pass
    return {
        FORWARD: forwards,
        INPUT_GRADIENT: gradients,
        TRAINING: networks * (1 + weight_passes[slots["weights"]]),
    }


def _attack_gradients(adversary: str, options: Mapping[str, Any]) -> int | None:
    if adversary == "none":
        return 0
    if adversary in ONE_STEP:
        return 1
    if adversary == "pgd" and int(options.get("restarts", 1)) == 1:
        return int(options["steps"])
    return None


def _depends_on_data(plan: Plan) -> bool:
    """RWP below the bench's own c_min stops early when no sample is easy any more."""
    return plan.slots["weights"] == "rwp" and float(plan.options["c_min"]) < 1e6
