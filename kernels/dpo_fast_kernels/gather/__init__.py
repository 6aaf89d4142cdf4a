"""Rows of a matrix by index, each any number of times, with a gradient that sums in a fixed order."""
