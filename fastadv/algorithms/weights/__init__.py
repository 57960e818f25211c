"""Perturbations of the weights during the outer step: one file per perturbation."""
