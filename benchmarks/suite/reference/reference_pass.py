"""How many pairs per second does the reference pass handle, against TRL's precomputation of the same log-probs?

    python benchmarks/run.py reference --dataset pairs.json --pairs 300 --max_length 1024 --batch_size 8

Both sides tokenise the same rows first, live in processes of their own and take turns, a slice of the rows each, while
the other waits. The clock runs from tokenised rows to log-probs at hand: for us with store, audit and index, for TRL
with its cache file. The log-probs of both are compared before any time is reported. Afterwards a fresh process of ours
does it all again and finds everything in the store: that is the time of a second run.

The last line printed is one JSON object; the same goes to --out.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from suite.harness.results import RESULTS, environment, spread, write_result

TOLERANCE = 2e-3  # nats, of a sequence in fp32


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", required=True, help="hub name, file or folder, in any format of dpo-fast train")
    parser.add_argument("--model", help="name or path; the demo's model when left out")
    parser.add_argument("--pairs", type=int, default=300)
    parser.add_argument("--slices", type=int, default=10, help="turns that each side takes")
    parser.add_argument("--max_length", type=int, default=1024)
    parser.add_argument("--batch_size", type=int, default=8, help="pairs that TRL pads together, its default 8")
    parser.add_argument("--out", type=Path, default=RESULTS)
    return parser.parse_args()


def main() -> None:
    options = parse()
    if options.model is None:
        from dpo_fast.commands.demo.model import demo_model

        options.model = str(demo_model())
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder:
        sides = {}
        for name in ("dpo_fast", "trl"):
            pipe, theirs = context.Pipe()
            context.Process(target=_work, args=(name, options, folder, theirs), daemon=True).start()
            sides[name] = pipe
            _receive(name, pipe)
        turns: dict[str, list[dict]] = {name: [] for name in sides}
        for index in range(options.slices):
            for name, pipe in sides.items():
                pipe.send(index)
                turns[name].append(_receive(name, pipe))
        for pipe in sides.values():
            pipe.send(None)
        pipe, theirs = context.Pipe()
        context.Process(target=_work, args=("dpo_fast", options, folder, theirs), daemon=True).start()
        _receive("dpo_fast again", pipe)
        pipe.send("all")
        again = _receive("dpo_fast again", pipe)
        pipe.send(None)
    _check(turns)
    result = _summary(options, turns, again)
    path = write_result(f"reference-fp32-len{options.max_length}-vs-trl", result, options.out)
    print("\n".join(result["summary"]))
    print(json.dumps({"speedup": result["speedup"], "second_run": again["seconds"], "file": str(path)}))


def _receive(name: str, pipe) -> Any:
    try:
        return pipe.recv()
    except EOFError:
        sys.exit(f"{name} ended with an error, see above")


def _work(name: str, options: argparse.Namespace, folder: str, pipe) -> None:
    """Build a trainer, then compute the log-probs of a slice for every message: the child process."""
    os.environ["HF_DATASETS_CACHE"] = str(Path(folder, "datasets", name))
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    from transformers.utils import logging

    logging.disable_progress_bar()
    rows, log_probs = _SIDES[name](options, folder)
    pipe.send("ready")
    while (turn := pipe.recv()) is not None:
        bounds = [len(rows) * k // options.slices for k in range(options.slices + 1)]
        part = rows if turn == "all" else rows.select(range(bounds[turn], bounds[turn + 1]))
        began = time.perf_counter()
        values = log_probs(part)
        pipe.send({"seconds": time.perf_counter() - began, "pairs": len(part), "log_probs": values})


def _arguments(options: argparse.Namespace, folder: str, name: str) -> dict[str, Any]:
    return {
        "output_dir": str(Path(folder, name)),
        "max_length": options.max_length,
        "max_steps": 1,
        "gradient_checkpointing": False,
        "report_to": [],
        "disable_tqdm": True,
        "use_cpu": True,
        "bf16": False,
    }


def _rows(options: argparse.Namespace):
    from datasets import Dataset

    from dpo_fast.data.formats import detect_format
    from dpo_fast.data.loading import load_preference_dataset

    dataset = load_preference_dataset(options.dataset, split="train")
    read = detect_format(dataset.column_names).read
    rows = [read(row) for row in dataset.select(range(options.pairs))]
    (winner, loser), *_ = rows[0].comparisons
    return Dataset.from_list(
        [{"prompt": r.prompt, "chosen": r.completions[winner], "rejected": r.completions[loser]} for r in rows]
    )


def _dpo_fast(options: argparse.Namespace, folder: str):
    from dpo_fast.config import DPOConfig
    from dpo_fast.trainer import DPOTrainer
    from dpo_fast.training.datasets import PreferenceDatasets

    class WithoutPass(PreferenceDatasets):
        """Leave the reference pass to the clock."""

        def with_reference(self, dataset, name):
            return dataset

    class Waiting(DPOTrainer):
        _datasets_class = WithoutPass

    args = DPOConfig(**_arguments(options, folder, "dpo_fast"), reference_cache_dir=str(Path(folder, "reference")))
    trainer = Waiting(options.model, args=args, train_dataset=_rows(options))
    return trainer.train_dataset, lambda part: trainer.reference.with_logps(part, "benchmark")["ref_logps"][:]


def _trl(options: argparse.Namespace, folder: str):
    import trl

    trainer = trl.DPOTrainer(
        options.model, args=trl.DPOConfig(**_arguments(options, folder, "trl")), train_dataset=_rows(options)
    )
    trainer._precompute_model_hash = "benchmark"

    def log_probs(part):
        part = trainer._precompute_ref_logps(part, "benchmark", options.batch_size)
        return list(zip(part["ref_chosen_logps"], part["ref_rejected_logps"], strict=True))

    return trainer.train_dataset, log_probs


_SIDES = {"dpo_fast": _dpo_fast, "trl": _trl}


def _check(turns: dict[str, list[dict]]) -> None:
    for index, sides in enumerate(zip(*turns.values(), strict=True)):
        ours, theirs = ([value for pair in side["log_probs"] for value in pair] for side in sides)
        if len(ours) != len(theirs):
            sys.exit(
                f"slice {index}: the sides kept {len(ours) // 2} and {len(theirs) // 2} pairs; lengthen max_length"
            )
        worst = max(abs(a - b) - 1e-5 * abs(b) for a, b in zip(ours, theirs, strict=True))
        if worst > TOLERANCE:
            sys.exit(f"slice {index}: a log-prob is off by {worst} nat; what computes something else is not timed")


def _summary(options: argparse.Namespace, turns: dict[str, list[dict]], again: dict[str, Any]) -> dict[str, Any]:
    sides = {}
    for name, slices in turns.items():
        seconds = sum(part["seconds"] for part in slices)
        rates = [part["pairs"] / part["seconds"] for part in slices]
        pairs = sum(part["pairs"] for part in slices)
        sides[name] = {
            "pairs_per_second": pairs / seconds,
            "of_slices": spread(rates),
            "pairs": pairs,
            "seconds": seconds,
        }
    speedup = sides["dpo_fast"]["pairs_per_second"] / sides["trl"]["pairs_per_second"]
    lines = [f"{'':12}{'pairs/s':>10}{'p20–p80':>18}{'seconds':>10}"]
    for name, side in sides.items():
        low, high = side["of_slices"]["p20"], side["of_slices"]["p80"]
        lines.append(f"{name:12}{side['pairs_per_second']:10.3f}{low:9.3f}–{high:<8.3f}{side['seconds']:10.1f}")
    lines.append(f"speed-up {speedup:.2f}×; a second run takes {again['seconds']:.2f} s for {again['pairs']} pairs")
    return {
        "question": "pairs per second of the reference pass, against TRL's precomputation",
        "speedup": speedup,
        "second_run_seconds": again["seconds"],
        "summary": lines,
        "sides": sides,
        "settings": {
            **{key: value for key, value in vars(options).items() if key != "out"},
            "dataset": Path(options.dataset).name,
            "model": Path(options.model).name,
        },
        "environment": environment(),
    }
