"""Files and codes as bytes: safetensors, GGUF, packed int4 and int8. Knows no model."""
