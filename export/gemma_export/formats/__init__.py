"""File formats and packed codes: safetensors, GGUF, int4 and int8. Independent of the model."""
