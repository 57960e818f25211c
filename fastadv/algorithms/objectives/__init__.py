"""What the outer step minimises, per sample: one file an objective."""
