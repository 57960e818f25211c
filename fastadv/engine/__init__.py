"""How a step runs: guarding the model, gradients, precision, compilation, capture, noise, processes."""
