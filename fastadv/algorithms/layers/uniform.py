"""All layers learn at the same rate."""

from fastadv.algorithms.contract import Layers


class Uniform(Layers):
    """Any optimizer fits: the parameters may be in any groups."""
