"""Speed and memory: bench and profile."""
