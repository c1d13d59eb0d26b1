"""One run, from recipe to artefact and evaluation: what train, compare and sweep have in common."""
