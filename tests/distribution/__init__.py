"""Models on many devices."""
