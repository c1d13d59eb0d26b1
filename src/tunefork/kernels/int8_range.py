"""What the scale of a row of int8 codes goes by (`int8_rows.py`)."""

LARGEST = 127
"""The code of a row's largest magnitude."""
LEAST = 1e-30
"""What the largest magnitude of a row of zeros is taken for."""
