"""What the targets that keep predictions of each sample have in common."""

SEVERAL = (
    "it averages one prediction per sample and epoch, and the replays would give it several in a "
    "row, of one view and nearly the same weights."
)
"""Why such a target needs one update per batch."""
