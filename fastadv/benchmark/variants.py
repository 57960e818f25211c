"""Ways to run a step that are off, because no row shows that they are faster.

- reuse: a sum that two later kernels read is stored instead of computed in both: fewer bytes
  between the convolutions, a few more kernels.
- combined: independent small kernels become one. (With "cooperative" nothing is left to combine.)
- cooperative: BatchNorm's statistics and the operations that read them are one kernel, whose blocks
  wait for each other: a third of the kernels, although Inductor's own rules do not do it for so few
  channels. For channels_last torch 2.11 gives each program two or four channels of every pixel, 64
  to 128 programs of two warps in all on an H100: far fewer bytes in flight than three kernels have.
- tuned: the tile sizes of each kernel are searched, which takes minutes.
- padded: the channels of the images are padded for the first convolution
  (``engine/model/padded_channels.py``). All others are settings of Inductor.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

from fastadv.engine.model.padded_channels import channels_padded
from fastadv.errors import unknown

NONE, PADDED = "none", "padded"
VARIANTS: dict[str, dict[str, Any]] = {
    NONE: {},
    "reuse": {"realize_reads_threshold": 2},
    "combined": {"combo_kernels": True},
    "cooperative": {
        "triton.cooperative_reductions": True,
        "triton.force_cooperative_reductions": True,
    },
    "tuned": {"coordinate_descent_tuning": True},
    PADDED: {},
}
"""Name -> settings of Inductor."""
FOR_A_GPU = ("combined", "cooperative", "tuned", PADDED)


def variant(name: str) -> AbstractContextManager[object]:
    """Within this context steps are created, and compiled, as the variant ``name`` (for one
    ``with``). Raises ``UserError`` for an unknown name."""
    if name not in VARIANTS:
        raise unknown("setting", name, VARIANTS)
    if name == PADDED:
        return channels_padded()
    # Imported here: it takes seconds, and starts CUDA, which does not survive a fork.
    from torch._inductor import config

    found: AbstractContextManager[object] = config.patch(VARIANTS[name])
    return found
