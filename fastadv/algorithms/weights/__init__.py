"""How weights are perturbed around the outer step: one file a way."""
