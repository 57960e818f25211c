"""Which weights are evaluated: one file an average."""
