"""Make the peers' virtual environments: ``python bench/peers/venvs.py``.

torchattacks and ART are installed in ``bench/peers/venvs/``, each in its own environment, which
shares torch and fastadv with the Python that runs this script. ``fastadv bench --peers`` also makes
missing environments.
"""

from fastadv.benchmark.peers.venvs import PACKAGES, interpreter

if __name__ == "__main__":
    for peer in PACKAGES:
        print(f"{peer}: {interpreter(peer)}")
