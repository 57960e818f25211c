"""Does this installation compute correctly on this GPU? The checks of ``fastadv doctor --gpu``."""
