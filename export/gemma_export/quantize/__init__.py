"""Quantization: recipes say what, rounding says how, the store holds the result once for all."""
