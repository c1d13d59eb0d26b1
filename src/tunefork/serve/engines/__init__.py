"""What answers requests behind the gateway."""
