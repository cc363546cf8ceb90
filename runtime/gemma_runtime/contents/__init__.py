"""What a bundle holds, read back from its files."""
