"""How fast a training step is: against the device's limits, its passes and other loops."""
