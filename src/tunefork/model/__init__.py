"""Load a base model and put low-rank deltas on it."""
