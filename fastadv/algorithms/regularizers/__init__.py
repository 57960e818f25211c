"""The regularizers, which are added to the loss: one file per regularizer."""
