"""Does training with dpo_fast take the same course as with another trainer?

    python benchmarks/run.py curves --dataset pairs.json --steps 200 --out DIR

Both train the demo's model (or --model) on the same rows in the same order, a pair a step, from the same seed, in fp32
at a learning rate that moves it (--learning_rate). Written: both curves, the largest difference of a step's loss, in
nats and as a share of the first loss, which is ln 2 on both sides, and a picture. No timing.

The last line printed is one JSON object; the same goes to --out.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Mapping, Sequence
from itertools import cycle, islice
from pathlib import Path
from typing import Any

from suite.harness.results import RESULTS, environment, write_result
from suite.training.models import model_config
from suite.training.setting import PROVIDER_NAMES, Setting
from suite.training.side import measure
from suite.training.summary import record
from suite.training.workloads import dataset_groups, save_rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", required=True, help="hub name, file or folder, in any format of dpo-fast train")
    parser.add_argument("--model", help="name or path; the demo's model when left out")
    parser.add_argument("--against", choices=PROVIDER_NAMES[1:], default="trl")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--batch_size", type=int, default=1, help="pairs a step")
    parser.add_argument("--pairs", type=int, default=150, help="different ones; used up, they come again")
    parser.add_argument("--max_length", type=int, default=512)
    parser.add_argument("--learning_rate", type=float, default=2e-6)
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()

    from transformers import AutoTokenizer

    from dpo_fast.commands.demo.model import demo_model

    model = options.model or str(demo_model())
    with tempfile.TemporaryDirectory() as folder:
        count = options.steps * options.batch_size
        rows = dataset_groups(
            options.dataset,
            min(options.pairs, count),
            group_size=2,
            max_length=options.max_length,
            tokenizer=AutoTokenizer.from_pretrained(model),
            vocab_size=model_config(model).get_text_config().vocab_size,
        )
        save_rows(list(islice(cycle(rows), count)), folder)
        measured = measure({name: setting(name, model, options) for name in ("dpo_fast", options.against)}, folder)
    if measured.failures:
        sys.exit(f"does not fit: {', '.join(measured.failures)}; lower batch_size or max_length")
    records = {name: record(report) for name, report in measured.reports.items()}
    curves = {name: {key: each[key] for key in ("losses", "gradient_norms")} for name, each in records.items()}
    largest = largest_difference(*(curve["losses"] for curve in curves.values()))
    result = {
        "question": "the course of training, step by step",
        "largest_loss_difference": largest,
        "largest_relative_to_first": largest / curves["dpo_fast"]["losses"][0],
        "curves": curves,
        "summary": [f"largest difference of {options.steps} losses: {largest:.2e} nat"],
        "settings": {**vars(options), "model": Path(model).name, "dataset": Path(options.dataset).name, "out": None},
        "environment": environment(),
    }
    path = write_result(f"curves-fp32-len{options.max_length}-vs-{options.against}", result, options.out)
    draw({name: curve["losses"] for name, curve in curves.items()}, result, path.with_suffix(".png"))
    print(json.dumps({"file": str(path), "largest_loss_difference": largest}))


def setting(name: str, model: str, options: argparse.Namespace) -> Setting:
    """Return the setting of one trainer."""
    return Setting(
        name,
        model,
        options.batch_size,
        max_length=options.max_length,
        steps=options.steps - 1,  # the first one warms up
        watched=False,
        learning_rate=options.learning_rate,
    )


def largest_difference(ours: Sequence[float], theirs: Sequence[float]) -> float:
    return max(abs(a - b) for a, b in zip(ours, theirs, strict=True))


def draw(curves: Mapping[str, Sequence[float]], result: Mapping[str, Any], path: Path) -> None:
    """Draw running means of 20 losses over each other, and the difference of every step."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (above, below) = plt.subplots(2, 1, figsize=(7, 6), sharex=True, layout="constrained")
    for (name, losses), style in zip(curves.items(), ("-", "--"), strict=True):
        means = [sum(losses[max(0, k - 19) : k + 1]) / min(20, k + 1) for k in range(len(losses))]
        above.plot(means, style, label=name)
    above.set(ylabel="loss, mean of 20 steps")
    above.legend()
    ours, theirs = curves.values()
    below.plot([abs(a - b) for a, b in zip(ours, theirs, strict=True)], ".")
    below.set(xlabel="step", ylabel="difference of the losses, nat", yscale="log")
    found = result["environment"]
    versions = ", ".join(f"{name} {found['versions'].get(name, '–')}" for name in ("torch", "transformers", "trl"))
    figure.supxlabel(f"{result['settings']['model']}, fp32, {found['hardware']}, {versions}", fontsize=7)
    figure.savefig(path, dpi=130)
