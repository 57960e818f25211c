"""The targets, which say what label is fitted: one file per target."""
