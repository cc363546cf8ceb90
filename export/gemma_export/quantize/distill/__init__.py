"""Distillation: the rounded model learns the float32 model's logits."""
