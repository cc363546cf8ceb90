"""Core ML: the decoder as MIL operations in an `.mlpackage`."""
