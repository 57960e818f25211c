"""What is added to the loss: one file a regularizer."""
