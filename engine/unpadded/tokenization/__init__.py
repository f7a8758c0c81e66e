"""Text to token ids, in windows of texts."""
