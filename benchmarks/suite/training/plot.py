"""Pictures of what run.py speed has measured.

    python benchmarks/run.py plot speedup benchmarks/results/*_train-*.json --out speedup.png
    python benchmarks/run.py plot growth benchmarks/results/*_train-smollm2-135m-one-to-one-*.json --out growth.png

speedup   pairs per second against TRL (or --against) by max_length, a line for each batch size, best against best, each
          dataset, number of completions, and training of all weights or an adapter
growth    seconds and peak memory of a step over its unique tokens, a point a file, with the line that fits best and its
          R²; a step that does what it must, and no more, grows linearly

Hardware and versions stand below; files of different machines or versions do not go into one figure. The last line
printed is one JSON object, with the fits.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

Result = Mapping[str, Any]
_VERSIONS = ("torch", "transformers", "trl")


@dataclass(frozen=True)
class Line:
    """A line, y = slope · x + intercept, and the share of y's variance that it explains."""

    slope: float
    intercept: float
    r_squared: float


def linear_fit(x: Sequence[float], y: Sequence[float]) -> Line:
    """Return the line of least squares.

    Raises:
        ValueError: fewer than three points, or all at one x.
    """
    count = len(x)
    mean_x, mean_y = sum(x) / count, sum(y) / count
    spread_x = sum((a - mean_x) ** 2 for a in x)
    if count < 3 or not spread_x:
        raise ValueError(f"x: {list(x)} are too few different points for a line; give at least three results")
    slope = sum((a - mean_x) * (b - mean_y) for a, b in zip(x, y, strict=True)) / spread_x
    intercept = mean_y - slope * mean_x
    residual = sum((b - slope * a - intercept) ** 2 for a, b in zip(x, y, strict=True))
    total = sum((b - mean_y) ** 2 for b in y)
    return Line(slope, intercept, 1 - residual / total if total else 1.0)


def caption(results: Sequence[Result]) -> str:
    """Return hardware, versions and date of results.

    Raises:
        ValueError: they differ in hardware or versions.
    """
    found = {
        (
            result["environment"]["hardware"],
            *(f"{name} {result['environment']['versions'].get(name, '–')}" for name in _VERSIONS),
        )
        for result in results
    }
    if len(found) > 1:
        raise ValueError(f"results: of different hardware or versions, {sorted(found)}; draw them apart")
    models = {f"{result['settings']['model']}, {result['settings']['precision']}" for result in results}
    dates = sorted(result["environment"]["date"] for result in results)
    days = " to ".join(dict.fromkeys((dates[0], dates[-1])))
    return f"{'; '.join(sorted(models))}\n{', '.join(next(iter(found)))}, {days}"


def speedups(results: Sequence[Result], against: str) -> dict[str, list[tuple[int, float, float, float]]]:
    """Return lines of (max_length, speed-up, p20, p80) by their label; results without that side are left out."""
    lines = defaultdict(list)
    for result in results:
        if against in result["against"]:
            found, settings = result["against"][against], result["settings"]
            spread = found["speedup_per_step"]
            lines[_label(settings)].append((settings["max_length"], found["speedup"], spread["p20"], spread["p80"]))
    if not lines:
        raise ValueError(f"against={against!r} is in none of the results; take a side that they compare with")
    return {label: sorted(points) for label, points in sorted(lines.items())}


def _label(settings: Mapping[str, Any]) -> str:
    rows = Path(settings["synthetic"] or settings["dataset"]).stem
    batch = f"best, {settings['global_batch']} a step" if settings["best"] else f"batch {settings['batch_size']}"
    completions = f", {settings['group_size']} completions" if settings["group_size"] > 2 else ""
    recomputing = ", checkpointing" if settings["checkpointing"] and not settings["best"] else ""
    weights = ", LoRA" if settings["lora"] else ""
    ours = "" if settings["ours"] == "dpo_fast" else f"{settings['ours']}: "
    return f"{ours}{rows}, {settings['precision']}, {batch}{recomputing}{completions}{weights}"


def growth(results: Sequence[Result]) -> dict[str, dict[str, Any]]:
    """Return unique tokens, seconds and peak memory of a step, a point per result, with fitted lines, by side."""
    sides: dict[str, dict[str, Any]] = defaultdict(lambda: {"tokens": [], "largest": [], "seconds": [], "gib": []})
    for result in results:
        tokens = result["unique_tokens"]
        for name, side in result["sides"].items():
            points = sides[name]
            points["tokens"].append(sum(tokens) / len(tokens))
            points["seconds"].append(sum(side["seconds"]) / len(side["seconds"]))
            points["largest"].append(max(tokens))  # which is the step that takes most memory
            points["gib"].append(side["peak_memory_gib"])
    for points in sides.values():
        points["time_fit"] = linear_fit(points["tokens"], points["seconds"])
        points["memory_fit"] = linear_fit(points["largest"], points["gib"])
    return dict(sides)


def _figure(panels: int) -> tuple[Any, Sequence[Any]]:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, panels, figsize=(1 + 5.5 * panels, 4.6), layout="constrained", squeeze=False)
    return figure, axes[0]


def _save(figure: Any, results: Sequence[Result], path: Path) -> None:
    figure.supxlabel(caption(results), fontsize=7)
    figure.savefig(path, dpi=130)


def draw_speedup(results: Sequence[Result], against: str, path: Path) -> dict[str, Any]:
    lines = speedups(results, against)
    figure, (axes,) = _figure(1)
    for label, points in lines.items():
        lengths, ratios, low, high = zip(*points, strict=True)
        (line,) = axes.plot(lengths, ratios, "o-", label=label)
        axes.fill_between(lengths, low, high, color=line.get_color(), alpha=0.15)
    axes.axhline(1, color="grey", linewidth=0.8)
    ticks = sorted({point[0] for points in lines.values() for point in points})
    axes.set_xscale("log", base=2)
    axes.set_xticks(ticks, map(str, ticks))
    axes.set(xlabel="max_length", ylabel=f"pairs per second, times {against}'s", ylim=(0, None))
    axes.legend(fontsize=8)
    _save(figure, results, path)
    return {"speedups": lines}


def draw_growth(results: Sequence[Result], path: Path) -> dict[str, Any]:
    sides = growth(results)
    figure, panels = _figure(2)
    drawn = (("tokens", "seconds", "time_fit", "seconds a step"), ("largest", "gib", "memory_fit", "peak memory, GiB"))
    for axes, (across, up, fit, label) in zip(panels, drawn, strict=True):
        for name, points in sides.items():
            line, ends = points[fit], [0, max(points[across])]
            (dots,) = axes.plot(points[across], points[up], "o", label=f"{name}, R² {line.r_squared:.4f}")
            axes.plot(ends, [line.slope * x + line.intercept for x in ends], color=dots.get_color(), linewidth=1)
        axes.set(xlabel="unique tokens a step", ylabel=label, xlim=(0, None), ylim=(0, None))
        axes.legend(fontsize=8)
    _save(figure, results, path)
    return {name: {fit: asdict(points[fit]) for fit in ("time_fit", "memory_fit")} for name, points in sides.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["speedup", "growth"])
    parser.add_argument("results", nargs="+", type=Path, help="result files of run.py speed")
    parser.add_argument("--against", default="trl", help="whom the speed-up is against")
    parser.add_argument("--out", type=Path, required=True, help="the picture")
    options = parser.parse_args()
    results = [json.loads(path.read_text()) for path in options.results]
    results = [result for result in results if "unique_tokens" in result]  # others are of an earlier form
    if not results:
        sys.exit("results: none is of run.py speed as it is now; measure again")
    try:
        if options.what == "speedup":
            found = draw_speedup(results, options.against, options.out)
        else:
            found = draw_growth(results, options.out)
    except ValueError as error:
        sys.exit(str(error))
    print(json.dumps({"file": str(options.out), **found}))
