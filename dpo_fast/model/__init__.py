"""A Hugging Face model that takes packed batches."""
