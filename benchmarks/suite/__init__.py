"""The questions that benchmarks answer, and what they share."""
