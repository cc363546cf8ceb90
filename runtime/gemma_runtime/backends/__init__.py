"""Backends: one module for each runtime. `gemma_runtime.backend_table` lists them."""
