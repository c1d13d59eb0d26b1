"""What leaves the house: one folder or file for other programs, proven to be what was trained."""
