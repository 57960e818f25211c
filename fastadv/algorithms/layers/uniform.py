"""All layers learn at the same rate."""

from dataclasses import dataclass

from fastadv.algorithms.contract import Layers


@dataclass(eq=False)
class Uniform(Layers):
    """Any optimizer fits: the parameters may be in any groups."""
