"""Counter-based random draws: they depend on numbers, not on previous draws.

Every draw is a hash (the finaliser of SplitMix64: Steele, Lea, Flood 2014) of a seed, a few
counters and the row of a sample, in wrapping int64 arithmetic. So the result is the same on every
device, in every version of torch, for any number of processes, and after a resume.
"""

import torch
from torch import Tensor

from fastadv.data.view import View

_GAMMA = 0x9E3779B97F4A7C15
_MIX1 = 0xBF58476D1CE4E5B9
_MIX2 = 0x94D049BB133111EB
_MASK = (1 << 64) - 1

# Each use of randomness has its own stream, so that the draws are independent.
ORDER, VIEW, SECOND_VIEW, MIXED_ROWS, MIXED_ORDER, SPLIT, LIMIT = range(7)
AUGMENT, SECOND_AUGMENT, NOISY_ROWS, NOISY_LABELS = range(9, 13)
MIX = 29


def _signed(value: int) -> int:
    return value - (1 << 64) if value >> 63 else value


def _key(*counters: int) -> int:
    state = 0
    for counter in counters:
        state = (state ^ (counter & _MASK)) + _GAMMA & _MASK
        state = (state ^ state >> 30) * _MIX1 & _MASK
        state = (state ^ state >> 27) * _MIX2 & _MASK
        state ^= state >> 31
    return state


def _shifted(value: Tensor, bits: int) -> Tensor:
    # torch shifts int64 with the sign; the mask makes it the unsigned shift of the original.
    return (value >> bits) & ((1 << (64 - bits)) - 1)


def hashed(rows: Tensor, *counters: int) -> Tensor:
    """63 random bits for each of ``rows`` (int64, any shape): a pure function of all arguments."""
    value = rows * _signed(_GAMMA) + _signed(_key(*counters))
    value = (value ^ _shifted(value, 30)) * _signed(_MIX1)
    value = (value ^ _shifted(value, 27)) * _signed(_MIX2)
    return _shifted(value ^ _shifted(value, 31), 1)


def uniform(rows: Tensor, *counters: int) -> Tensor:
    """A float64 in [0,1) for each of ``rows``."""
    return (hashed(rows, *counters) >> 10).double() / (1 << 53)


def integers(rows: Tensor, high: int, *counters: int) -> Tensor:
    """An int64 in [0, ``high``) for each of ``rows``; the bias of the modulo is under 2^-32."""
    return hashed(rows, *counters) % high


def shuffled(rows: Tensor, *counters: int) -> Tensor:
    """``rows`` (n,) in a random order that depends only on the rows and the counters."""
    return rows[torch.argsort(hashed(rows, *counters), stable=True)]


def draw_view(rows: Tensor, seed: int, epoch: int, pad: int, flip: bool, stream: int) -> View:
    """Crop and flip for the samples ``rows`` (n,) in ``epoch``; see ``View`` for the units."""
    bits = hashed(rows, stream, seed, epoch)
    side = 2 * pad + 1
    flipped = (bits & 1).bool() if flip else torch.zeros_like(rows, dtype=torch.bool)
    return View((bits >> 1) % side, (bits >> 32) % side, flipped)
