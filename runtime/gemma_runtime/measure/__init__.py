"""Measures speed and memory: bench and profile."""
