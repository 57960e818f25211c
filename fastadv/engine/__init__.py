"""How a step runs: gradients, precision, compilation, capture, noise, optimizer, processes."""
