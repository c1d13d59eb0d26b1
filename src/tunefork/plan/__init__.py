"""What a run will take before it is started: memory, time and money on a named machine."""
