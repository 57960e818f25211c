"""The words in which a publication's start of the attack is stated (``Published.start``)."""

from typing import Final

UNIFORM: Final = "a uniform random point of the ball, clipped to [0,1]"
UNCLIPPED: Final = "a uniform random point of the ball, not clipped to [0,1]"
NEAR: Final = "x + 0.001 N(0,1), not clipped to [0,1]"
IMAGE: Final = "the image itself"
NOISY: Final = "the image after uniform noise of eps, the centre of the ball"
WIDE: Final = "the image after uniform noise of 2 eps"
GRADIENT: Final = "x + the gradient of the loss at x; the first gradient is where [0,1] clips it"
STORED: Final = "the end of the sample's attack in the epoch before"
STORED_SIGNS: Final = (
    "the stored perturbation, at first 8/255 times random signs; not clipped to [0,1]"
)
LEARNED: Final = "a learned perturbation of the sample"
KEPT: Final = "what the batch before left at the same place, at first the image"
NO_ATTACK: Final = "there is no attack"
