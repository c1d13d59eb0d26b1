"""Rows of a file become token ids with their supervised tokens marked, in batches."""
