"""The objectives, the outer loss per sample: one file per objective."""
