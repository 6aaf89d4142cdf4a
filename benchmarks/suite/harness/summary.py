"""What the newest results in a folder say, and predictions beside what was measured. Needs no PyTorch.

    python benchmarks/run.py summary FOLDER

A result's own `summary` is taken, a list of lines; where it has none, its figures that stand by themselves.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

_TRAINING = "train-llama-3.2-1b-ultrafeedback-full-bf16-len2048-b8-"
PREDICTIONS = Path(__file__).parents[2] / "predictions.json"


def newest(folder: Path) -> dict[tuple[str, str], Path]:
    """Return the newest result file by hardware and question."""
    files = {}
    for path in sorted(folder.glob("*_*_*.json")):  # later dates come later
        _, hardware, question = path.stem.split("_", 2)
        files[hardware, question] = path
    return files


def result_sections(folder: Path) -> list[list[str]]:
    """Return the lines of every newest result."""
    sections = []
    for (_, question), path in newest(folder).items():
        result = json.loads(path.read_text())
        figures = {name: value for name, value in result.items() if isinstance(value, (int, float))}
        own = result.get("summary")
        lines = own if isinstance(own, list) else [f"  {name}: {value:.4g}" for name, value in figures.items()]
        sections.append([f"{question} ({path.name})", *lines])
    return sections


def measured(folder: Path, hardware: str) -> dict[str, tuple[float, bool]]:
    """Return milliseconds by name of a figure, as predictions name it, and whether it disagrees."""
    found = {}
    for (machine, question), path in newest(folder).items():
        if hardware in machine:
            for name, milliseconds, row in _figures(question, json.loads(path.read_text())):
                found[name] = (milliseconds, bool(row.get("disagrees")))
    return found


def _figures(question: str, result: Mapping[str, Any]) -> Iterator[tuple[str, float, Mapping[str, Any]]]:
    if question == "ceilings":
        for name in ("product", "copy"):
            yield f"ceilings, {name}", result[f"{name}_ms"], result
    elif question.startswith(("head-", "rows")):
        kind = question.partition("-")[0]
        for problem in result["problems"]:
            about = f"{problem['shape']} {problem['rows' if kind == 'head' else 'dtype']}"
            for row in problem["table"]:
                if "ms" in row:
                    yield f"{kind}, {about}, {row['mode']} {row['provider']}", row["ms"]["median"], row
    elif question.startswith("attention"):
        for row in result["rows"]:
            yield f"attention, {row['model']}, {row['batch']}, {row['provider']}", row["both_ms"]["median"], row
    elif question.startswith("layout-1b"):
        for name, side in result["layouts"].items():
            yield f"layout, {name}", 1e3 * side["seconds_per_step"]["median"], result
    elif question.startswith(_TRAINING):
        rest = question.removeprefix(_TRAINING)
        layers = {"compiled": "compile", "layers-liger": "liger"}.get(rest)
        for name, side in result["sides"].items():
            if layers or rest.startswith("vs-"):
                figure = f"layers, {layers}" if layers else f"training, {name}"
                yield figure, 1e3 * side["seconds_per_step"]["median"], result


def prediction_lines(folder: Path) -> list[str]:
    """Return a line per prediction that a result of its hardware answers, with what was measured beside it."""
    predictions = json.loads(PREDICTIONS.read_text())
    found = measured(folder, predictions["hardware"])
    answered = [each for each in predictions["figures"] if each["figure"] in found]
    if not answered:
        return [f"{len(predictions['figures'])} predictions, none measured yet; run.py predict prints them"]
    return prediction_table({**predictions, "figures": answered}, found)


def prediction_table(predictions: Mapping[str, Any], found: Mapping[str, tuple[float, bool]]) -> list[str]:
    """Return the lines of predictions, with milliseconds from `measured` where they are known."""
    title = f"predicted for one {predictions['hardware'].upper()}"
    lines = [f"{title:53}{'TFLOP':>8}{'GB':>8}{'FLOP ms':>9}{'GB ms':>8}{'predicted':>10}{'measured':>10}{'ratio':>7}"]
    for each in predictions["figures"]:
        line = f"{each['figure']:53}{each['tflop']:8.3g}{each['gb']:8.3g}{each['ms_flop']:9.2f}{each['ms_bytes']:8.2f}"
        line += f"{each['expected_ms']:10.2f}"
        if each["figure"] in found:
            milliseconds, disagrees = found[each["figure"]]
            line += f"{milliseconds:10.2f}{milliseconds / each['expected_ms']:7.2f}{'≠' if disagrees else ''}"
        lines.append(line)
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="folder of result files")
    folder = parser.parse_args().folder
    for section in [*result_sections(folder), prediction_lines(folder)]:
        print("\n".join(["", *section]))
