"""Exports EmbeddingGemma: models that give vectors of texts."""
