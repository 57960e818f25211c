"""Groupings of the layers that learn at different rates: one file per grouping."""
