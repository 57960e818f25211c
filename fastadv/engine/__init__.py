"""How a step runs: guard, gradients, precision, compilation, capture, noise, processes."""
