"""ExecuTorch: the decoder as XNNPACK delegates in one `.pte`."""
