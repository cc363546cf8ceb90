"""Core AI: the decoder as a traced module in an `.aimodel`."""
