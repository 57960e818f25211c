"""A whole run: its configuration, the loop over epochs, its folder, resuming."""
