"""The streams of the counter-based noise: one per purpose, so that no two share numbers.

A draw is named by (seed, stream, offset, sample, element); ``kernels/philox.py`` computes its bits
from that name. So the noise of a sample is the same in every mode and with any number of processes.
"""

START = 0  # random starts; a further restart r uses START + r
AUGMENTATION = 64  # noise that is part of the image (FGSM-N, N-FGSM)
REGULARIZER = 65
WEAKEN = 67  # the signs of a perturbation that are flipped
STORE = 66  # the initial contents of a per-sample store

SECOND_VIEW = 1 << 31  # added to a sample's row for its second view in the same batch
NEIGHBOR = 1 << 40  # added to the offset for a second attack in the same update
EVALUATION = 128  # random starts of evaluation attacks; restart r uses EVALUATION + r
