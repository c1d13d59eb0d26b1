"""The fair comparison: trials, learning-rate search, verdict, report."""
