"""What every start needs: an adversary that begins where it says."""

from collections.abc import Iterable

from fastadv.algorithms.contract import Capabilities, Conflict, Start


class Begun(Start):
    """A start for adversaries that take one."""

    def conflicts(self, method: Capabilities) -> Iterable[Conflict]:
        if not method.takes_start:
            yield Conflict("adversary", "this adversary begins where its own definition says.")
