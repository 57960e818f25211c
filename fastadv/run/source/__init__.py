"""The images of a run: a data set in memory, or files that are decoded while training.

``opening.py`` opens them, with ``from_memory.py`` or ``from_files.py``; ``images.py`` says what a
run then has.
"""

from fastadv.run.source.batches import EvalBatches, LabelledImages, eval_batch_size
from fastadv.run.source.images import SETS, Source
from fastadv.run.source.opening import open_source

__all__ = ["SETS", "EvalBatches", "LabelledImages", "Source", "eval_batch_size", "open_source"]
