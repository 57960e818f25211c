"""The streams of the counter-based noise: one per purpose, so that no two share numbers.

A draw is named by (seed, stream, offset, sample, element); ``kernels/philox.py`` computes its bits
from that name. So the noise of a sample is the same in every mode and with any number of processes.

The numbers here are fastadv's own. A part names its streams: ``NEAR = noise_stream("elle.near")``.
"""

from __future__ import annotations

import sys
import zlib
from typing import NamedTuple

from fastadv.errors import UserError

START = 0  # random starts; a further restart r uses START + r
AUGMENTATION = 64  # noise that is part of the image (FGSM-N, N-FGSM)
WEAKEN = 67  # the signs of a perturbation that are flipped
NAMED = 68  # all named streams, told apart by their shift
TARGETS = 69  # random target labels
EVALUATION = 128  # random starts of evaluation attacks; restart r uses EVALUATION + r

SECOND_VIEW = 1 << 31  # added to a sample's row for its second view in the same batch
RESTART = 1 << 32  # added to the offset of a named stream for each restart, of which there are few
NEIGHBOR = 1 << 40  # added to the offset for a second attack in the same update
_FIRST_BIT, _BITS = 41, 15  # of the offset, in which named streams differ


class Stream(NamedTuple):
    """A stream: its ``number``, and what is added to the offset of its draws."""

    number: int
    shift: int = 0


STORE = Stream(66)  # the initial contents of a per-sample store

_names: dict[Stream, tuple[str, str]] = {}  # stream -> its name, and the module that made it


def noise_stream(name: str) -> Stream:
    """The stream called ``name``, such as "elle.near": made once, at the top of a module.

    Raises ``UserError`` if another module has a stream of this name, or of this number.
    """
    module = sys._getframe(1).f_globals.get("__name__", "")
    found = Stream(NAMED, (zlib.crc32(name.encode()) % (1 << _BITS)) << _FIRST_BIT)
    other, owner = _names.setdefault(found, (name, module))
    if (other, owner) != (name, module):
        raise UserError(
            f"The noise stream {name!r} of {module} would draw the numbers of {other!r} of "
            f"{owner}: give it another name."
        )
    return found
