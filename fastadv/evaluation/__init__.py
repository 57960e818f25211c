"""Accuracy of a trained model, clean and under attacks, with confidence intervals."""
