"""The interface between the parts of a recipe and the step.

A part is a dataclass whose fields are its options. It reads the run from ``Setup``, and it owns
its state as preallocated tensors in ``self.state``, which it changes in place. Each file holds one
idea. To write a part read them in this order:

1. ``tensors``: the batch, and what the parts compute from it one after another.
2. ``part``: the hooks that all parts share, and ``NEEDS``, what the step computes for them.
3. The base class of the slot: ``adversary``, ``attack_loss``, ``start``, ``objective``,
   ``target``, ``regularizer`` (with ``weighted``), ``weights``, ``layers``, ``averaging``.
4. If needed: ``setup``, the run; ``capabilities``, what a part may know of the others;
   ``passes``, in which it counts its cost; ``abilities``, what single parts can do beside the
   hooks.

When the hooks are called:

- To resolve a method, without a network: ``requires``, ``sample_state``, ``is_plain``,
  ``conflicts``, ``extra_passes``.
- When the step is built: ``check_threat``, then ``Layers.bind``.
- Before the first update, or before a state is loaded: ``prepare``, then ``Averaging.start``.
- In each update: ``check_images``, ``schedule``; ``Target.prepare_batch``, ``Adversary.make``
  (with ``Start.point`` and ``AttackLoss``), ``WeightPerturbation.perturb``; the outer pass with
  ``Objective.per_sample``, ``Target.fit`` and ``Regularizer.term``; the optimizer's step;
  ``after``, ``Adversary.unmoved``, ``Averaging.update``. ``training/update.py`` has the code.
- At other times: ``follow_model`` and ``bind`` after a change of the model, ``load_state`` when a
  run is resumed, ``advice`` when the user asks, ``report`` at the end of an epoch.

Every part keeps these invariants, so that a step can be compiled and captured as it is:

- No Python branch depends on the value of a tensor, and nothing waits for the device.
- A value that changes between updates (a ramp, a learned step size) is a 0-dim tensor, filled in
  place. A part that has not begun yet (a warm-up) sets ``active`` to False; ``active`` changes
  with the epoch only.
- Every forward pass is ``self.net.logits``. Every gradient comes from ``engine.gradient``, with
  respect to a ``leaf`` made there.
- State is written only where ``ok`` is true.
"""

from fastadv.algorithms.contract.abilities import (
    BeginsAtCenter,
    Clipped,
    CountsCorrect,
    FlatAtCenter,
    FollowsThreat,
    ForwardsCenter,
    Freezes,
    GivenLoss,
    HasNeighbor,
    KeepsPlaces,
    LearnsSteps,
    LogsPasses,
    MovesCenter,
    NeedsHardLabels,
    OrdersBatchNorm,
    Penalizes,
    PerturbsBlocks,
    RankLocal,
    ReadsCenterGradient,
    Renews,
    Replays,
    Reports,
    SetsRates,
    SharesForward,
    Teaches,
    WeighsKL,
)
from fastadv.algorithms.contract.adversary import Adversary
from fastadv.algorithms.contract.attack_loss import AttackLoss
from fastadv.algorithms.contract.averaging import Averaging
from fastadv.algorithms.contract.capabilities import Capabilities, Conflict
from fastadv.algorithms.contract.layers import Layers
from fastadv.algorithms.contract.objective import Objective
from fastadv.algorithms.contract.part import NEEDS, Part, option_names
from fastadv.algorithms.contract.passes import (
    DOUBLE_BACKWARD,
    FORWARD,
    INPUT_GRADIENT,
    SHARED,
    TRAINING,
    UNITS,
    Pass,
)
from fastadv.algorithms.contract.regularizer import Regularizer
from fastadv.algorithms.contract.setup import Setup
from fastadv.algorithms.contract.start import Start
from fastadv.algorithms.contract.target import Fit, Target
from fastadv.algorithms.contract.tensors import (
    Adversarial,
    Batch,
    Context,
    Outcome,
    Outputs,
    required,
)
from fastadv.algorithms.contract.weighted import Weighted
from fastadv.algorithms.contract.weights import Losses, WeightGradient, WeightPerturbation

__all__ = [
    "DOUBLE_BACKWARD",
    "FORWARD",
    "INPUT_GRADIENT",
    "NEEDS",
    "SHARED",
    "TRAINING",
    "UNITS",
    "Adversarial",
    "Adversary",
    "AttackLoss",
    "Averaging",
    "Batch",
    "BeginsAtCenter",
    "Capabilities",
    "Clipped",
    "Conflict",
    "Context",
    "CountsCorrect",
    "Fit",
    "FlatAtCenter",
    "FollowsThreat",
    "ForwardsCenter",
    "Freezes",
    "GivenLoss",
    "HasNeighbor",
    "KeepsPlaces",
    "Layers",
    "LearnsSteps",
    "LogsPasses",
    "Losses",
    "MovesCenter",
    "NeedsHardLabels",
    "Objective",
    "OrdersBatchNorm",
    "Outcome",
    "Outputs",
    "Part",
    "Pass",
    "Penalizes",
    "PerturbsBlocks",
    "RankLocal",
    "ReadsCenterGradient",
    "Regularizer",
    "Renews",
    "Replays",
    "Reports",
    "SetsRates",
    "Setup",
    "SharesForward",
    "Start",
    "Target",
    "Teaches",
    "WeighsKL",
    "WeightGradient",
    "WeightPerturbation",
    "Weighted",
    "option_names",
    "required",
]
