"""Sessions on the runtimes: one module per target, and the code that they share."""
