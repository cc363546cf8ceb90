"""GGUF: the codes as ggml blocks, for llama.cpp and Ollama."""
