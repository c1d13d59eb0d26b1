"""Held-out loss, labels, generated answers and forgetting, each with its interval."""
