"""What a figure is quoted with: its spread over repeats, and the versions of the packages that made it."""

from __future__ import annotations

import importlib.metadata
import platform
import statistics
from collections.abc import Iterable, Sequence


def spread(values: Sequence[float]) -> dict[str, float]:
    """Return the median with the 20th and 80th percentile."""
    if len(values) == 1:
        return {"median": values[0], "p20": values[0], "p80": values[0]}
    deciles = statistics.quantiles(values, n=10, method="inclusive")
    return {"median": statistics.median(values), "p20": deciles[1], "p80": deciles[7]}


def versions(packages: Iterable[str]) -> dict[str, str]:
    """Return the versions of Python and of those packages that are installed."""
    found = {"python": platform.python_version()}
    for package in packages:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found
