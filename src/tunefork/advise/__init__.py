"""Which method, and how to start, from a description: rules as data, and the user's own runs."""
