"""Rows of any accepted format become tokenised preference groups."""
