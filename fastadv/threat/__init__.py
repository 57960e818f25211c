"""The threat model: which perturbations an attack may use.

``ball`` is the class ``Threat``. Below it: numbers for each channel (``values``), the mask
(``mask``); above it: the threat of a part of a batch, and of a recording (``batch``).
"""

from fastadv.threat.ball import NORMS, USUAL_EPS, Threat, usual_threat
from fastadv.threat.values import Bound, Radius

__all__ = ["NORMS", "USUAL_EPS", "Bound", "Radius", "Threat", "usual_threat"]
