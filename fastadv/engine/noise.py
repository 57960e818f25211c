"""Which stream of the counter-based noise each purpose draws from, so that none shares numbers.

A draw is named by (seed, stream, offset, sample, element); ``kernels/reference.py`` turns that
name into bits. The same sample draws the same noise in every mode and number of processes.
"""

START = 0  # random starts; a further restart r uses START + r
AUGMENTATION = 64  # noise that is part of the image (FGSM-N, N-FGSM)
REGULARIZER = 65
WEAKEN = 67  # which signs of a perturbation are flipped
STORE = 66  # the initial contents of a per-sample store

SECOND_VIEW = 1 << 31  # added to a sample's row for its second view in the same batch
NEIGHBOR = 1 << 40  # added to the number of the draw for a second attack in the same update
EVALUATION = 128  # random starts of evaluation attacks; restart r uses EVALUATION + r
