"""fastadv: fast adversarial training in PyTorch."""
