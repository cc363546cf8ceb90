"""Bundles of EmbeddingGemma: they give vectors of texts instead of more text."""
