"""The losses that an attack maximises: one file per loss."""
