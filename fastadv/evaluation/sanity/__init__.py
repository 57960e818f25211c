"""Sanity of a robust number: whether the attacks that gave it could work at all."""
