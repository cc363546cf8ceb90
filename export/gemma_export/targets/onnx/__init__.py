"""ONNX Runtime: the decoder as fused operators."""
