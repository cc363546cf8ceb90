"""Checks an artifact against its checkpoint: goldens, verify, eval."""
