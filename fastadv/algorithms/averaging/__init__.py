"""Averages of the weights, which are evaluated in their place: one file per average."""
