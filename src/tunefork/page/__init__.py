"""What reports share: figures with intervals, how they are written, drawings in a page."""
