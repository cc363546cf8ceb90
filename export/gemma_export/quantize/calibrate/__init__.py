"""Calibrated rounding: text, layers streamed past it, GPTQ, and the choice of bits."""
