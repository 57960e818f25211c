"""Which layers learn, and at which rate: one file a grouping."""
