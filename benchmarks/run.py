"""Entry point of the benchmarks: `python benchmarks/run.py QUESTION [options]`; each question explains its options.

Without a question it lists them. Results go to `benchmarks/results/`, or where --out says.
"""

from __future__ import annotations

import importlib
import sys

QUESTIONS = {
    "speed": ("training.speed", "pairs per second of a training step, against other trainers on the same rows"),
    "curves": ("training.curves", "do the losses of training take TRL's course"),
    "rounding": ("training.rounding", "how far bf16 log-probs are from fp32's, packed and padded"),
    "layout": ("training.layout", "the shared layout against padded rows, all else equal"),
    "bits": ("training.bits", "do three short trainings still end with the same bits"),
    "plot": ("training.plot", "a picture of what `speed` measured"),
    "reference": ("reference.reference_pass", "pairs per second of the reference pass, against TRL's precomputation"),
    "store": ("reference.store", "seconds and memory of a store of millions of rows"),
    "head": ("ops.head", "the LM head, forward and backward: ours, peers, bare products"),
    "rows": ("ops.rows", "bytes per second of the work on rows of logits, against a copy"),
    "attention": ("ops.attention", "shared-prefix attention, against a plain variable-length call of as many FLOP"),
    "liger": ("ops.liger", "FusedLinearDPOLoss against Liger's, same arguments"),
    "smoke": ("gpu.smoke", "does everything run that a GPU may do otherwise, riskiest first"),
    "kernels": ("gpu.kernels", "which kernels a training step spends its time in"),
    "gpu": ("gpu.call", "all of it on a GPU, in one call"),
    "predict": ("gpu.predict", "what an H200 should take, counted before it is measured"),
    "summary": ("harness.summary", "a short table of the newest results in a folder, predictions beside them"),
}


def main() -> None:
    if len(sys.argv) < 2 or sys.argv[1] not in QUESTIONS:
        known = "\n".join(f"  {name:10} {what}" for name, (_, what) in QUESTIONS.items())
        print(f"usage: run.py QUESTION [options], where QUESTION is one of\n\n{known}")
        sys.exit(0 if sys.argv[1:] in ([], ["-h"], ["--help"]) else 2)
    question = sys.argv.pop(1)
    sys.argv[0] = f"{sys.argv[0]} {question}"
    importlib.import_module(f"suite.{QUESTIONS[question][0]}").main()


if __name__ == "__main__":
    main()
