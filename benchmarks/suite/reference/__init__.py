"""The reference pass and its store."""
