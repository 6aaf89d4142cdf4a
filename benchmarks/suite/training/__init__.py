"""Whole training steps: speed, course, rounding, layout."""
