"""``python -m fastadv``, which torchrun can start: ``torchrun --nproc-per-node 8 -m fastadv``."""

from fastadv.cli.start import start

start()
