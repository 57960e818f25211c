"""Make the peers' virtual environments: ``python bench/peers/venvs.py``.

torchattacks and ART are installed in ``bench/peers/venvs/``, each in an environment of its own
that shares torch and fastadv with the Python that runs this. ``fastadv bench --peers`` makes
missing ones by itself; this only does it ahead of time.
"""

from fastadv.benchmark.peers.venvs import PACKAGES, interpreter

if __name__ == "__main__":
    for peer in PACKAGES:
        print(f"{peer}: {interpreter(peer)}")
