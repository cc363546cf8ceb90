"""Code that several targets use."""
