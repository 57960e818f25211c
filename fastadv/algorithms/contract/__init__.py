"""What the parts of a recipe say to each other and to the step.

An update calls its parts in a fixed order (``training/update.py``). One file per idea: the tensors
of a batch (``tensors``), what a run is (``setup``), what all parts share (``part``), and one small
base class per slot. A part is a dataclass whose fields are its options; it reads what the run is
from ``Setup``, owns its state as preallocated tensors in ``self.state`` and changes them in place.

Invariants every part keeps, so that a step can be compiled and captured without a rewrite:

- no Python branch depends on the value of a tensor, and nothing waits for the device;
- what changes between updates (a ramp, a learned step size) is a 0-dim tensor filled in place,
  and a part that is not at work yet (a warm-up) says so by ``active``, which follows the epoch;
- every forward pass is ``self.net.logits``, every gradient comes from ``engine.gradient``, and
  what it is taken with respect to is a ``leaf`` made there;
- state is written only where ``ok`` is true.
"""

from fastadv.algorithms.contract.adversary import Adversary
from fastadv.algorithms.contract.averaging import Averaging
from fastadv.algorithms.contract.layers import Layers
from fastadv.algorithms.contract.objective import Objective
from fastadv.algorithms.contract.part import NEEDS, Part, option_names
from fastadv.algorithms.contract.regularizer import Regularizer
from fastadv.algorithms.contract.setup import Setup
from fastadv.algorithms.contract.target import Fit, Target
from fastadv.algorithms.contract.tensors import Adversarial, Batch, Context, Outputs, required
from fastadv.algorithms.contract.weights import Losses, WeightGradient, WeightPerturbation

__all__ = [
    "NEEDS",
    "Adversarial",
    "Adversary",
    "Averaging",
    "Batch",
    "Context",
    "Fit",
    "Layers",
    "Losses",
    "Objective",
    "Outputs",
    "Part",
    "Regularizer",
    "Setup",
    "Target",
    "WeightGradient",
    "WeightPerturbation",
    "option_names",
    "required",
]
