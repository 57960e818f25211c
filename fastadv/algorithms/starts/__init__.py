"""The starts of an attack: one file per start."""
