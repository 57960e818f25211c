"""One update of the weights: `fastadv.step`. The loop over epochs is in `fastadv.run`."""
