"""Which label is fitted: one file a target."""
