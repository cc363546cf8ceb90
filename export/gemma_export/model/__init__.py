"""Gemma as data, and its decoder written once for every target."""
