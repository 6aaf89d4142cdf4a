"""Preference groups, and the packed batches that a model runs on."""
