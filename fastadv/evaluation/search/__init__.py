"""Searches: iterative attacks of evaluation as one state per image, run on batches kept full."""
