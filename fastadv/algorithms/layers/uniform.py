"""Every layer learns alike."""

from dataclasses import dataclass

from fastadv.algorithms.contract import Layers


@dataclass(eq=False)
class Uniform(Layers):
    """One group, whatever optimizer the user brought."""
