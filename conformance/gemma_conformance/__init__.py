"""Tells whether a runtime of Gemma computes what the checkpoint says."""
