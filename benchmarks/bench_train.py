"""How many preference pairs per second does a training step handle, against another trainer on the same rows?

    python benchmarks/bench_train.py --dataset pairs.json --max_length 512 --batch_size 4 --against trl

Each side lives in its own process (so peak memory is its own) and both take turns, a step each, while the other waits.
Rows, order, seed, precision, optimizer and batch are the same; reference log-probs are computed before the clock starts
on both sides; nobody recomputes activations. The losses of all steps are compared before any time is reported. The
first step of each side warms up and does not count.

With --group_size K the rows are prompts with K ranked completions and no tie. A step is --batch_size such groups for
us, and for the other side the K·(K−1)/2 pairs of each of them, in one micro-batch.

The last line printed is one JSON object; the same is written to benchmarks/results/ unless --no_result.
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

from harness import environment, spread, write_result

LOSS_TOLERANCE = {"fp32": 1e-3, "bf16": 2e-2}


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", required=True, help="hub name, file or folder, in any format of dpo-fast train")
    parser.add_argument("--model", help="name or path; the demo's model when left out")
    parser.add_argument("--max_length", type=int, default=512)
    parser.add_argument("--batch_size", type=int, default=4, help="pairs a step, in one micro-batch")
    parser.add_argument("--group_size", type=int, default=2, help="completions of a prompt; --batch_size counts groups")
    parser.add_argument("--steps", type=int, default=6, help="timed steps of each side")
    parser.add_argument("--precision", choices=sorted(LOSS_TOLERANCE), default="fp32")
    parser.add_argument("--against", choices=["trl"], default="trl")
    parser.add_argument("--lora", action="store_true", help="train a rank-16 adapter instead of all weights")
    parser.add_argument("--no_result", action="store_true", help="print only, write no file")
    return parser.parse_args()


def main() -> None:
    options = parse()
    if options.model is None:
        from dpo_fast.demo.model import demo_model

        options.model = str(demo_model())
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder:
        sides = [_Side(context, name, options, folder) for name in ("dpo_fast", options.against)]
        for side in sides:  # one after the other: loading and reference pass do not disturb each other
            side.start()
        for _ in range(options.steps + 1):
            for side in sides:
                side.step()
        reports = {side.name: side.finish() for side in sides}
    _check_losses(reports, LOSS_TOLERANCE[options.precision])
    result = _summary(options, reports)
    _print_table(result)
    if not options.no_result:
        what = f"{'lora' if options.lora else 'full'}-{options.precision}-len{options.max_length}-b{options.batch_size}"
        what += f"-k{options.group_size}" if options.group_size > 2 else ""
        print("written to", write_result(f"train-{what}-vs-{options.against}", result))
    rates = {name: side["pairs_per_second"] for name, side in result["sides"].items()}
    print(json.dumps({"speedup": result["speedup"], "pairs_per_second": rates, "settings": result["settings"]}))


class _Side:
    """One trainer in a process of its own, that runs a step when it is told to."""

    def __init__(self, context, name: str, options: argparse.Namespace, folder: str):
        self.name = name
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_work, args=(name, options, folder, theirs), daemon=True)
        self._process.start()

    def _receive(self) -> Any:
        try:
            return self._pipe.recv()
        except EOFError:
            sys.exit(f"{self.name} ended with an error, see above")

    def start(self) -> None:
        self._pipe.send("start")
        self._receive()

    def step(self) -> None:
        self._pipe.send("step")
        self._receive()

    def finish(self) -> dict[str, Any]:
        self._pipe.send("finish")
        report = self._receive()
        self._process.join()
        return report


def _work(name: str, options: argparse.Namespace, folder: str, pipe) -> None:
    """The child process: builds the trainer, then one optimizer step for every message."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    pipe.recv()
    import torch
    from transformers import TrainerCallback
    from transformers.utils import logging

    logging.disable_progress_bar()
    cuda = torch.cuda.is_available()
    seconds, tokens = [], []

    class TakeTurns(TrainerCallback):
        """Waits for its turn before the first step and after every step; the clock runs in between."""

        def _wait(self) -> None:
            pipe.recv()
            self.began = time.perf_counter()

        def on_train_begin(self, *args, **kwargs):
            _reset_peak_memory(torch)
            pipe.send("ready")
            self._wait()

        def on_step_end(self, *args, **kwargs):
            if cuda:
                torch.cuda.synchronize()
            seconds.append(time.perf_counter() - self.began)
            pipe.send("done")
            if len(seconds) <= options.steps:
                self._wait()

    began = time.perf_counter()
    trainer = _TRAINERS[name](options, folder, tokens)
    prepared = time.perf_counter() - began
    trainer.add_callback(TakeTurns())
    trainer.train()
    pipe.recv()
    losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    pipe.send(
        {
            "losses": losses,
            "seconds": seconds[1:],
            "token_positions": tokens[1 : len(seconds)],
            "peak_memory_gib": _peak_memory(torch) / 2**30,
            "seconds_before_training": prepared,
        }
    )


def _pairs_a_group(options: argparse.Namespace) -> int:
    return options.group_size * (options.group_size - 1) // 2


def _arguments(options: argparse.Namespace, folder: str, name: str) -> dict[str, Any]:
    import torch

    return {
        "output_dir": str(Path(folder, name)),
        "max_length": options.max_length,
        "max_steps": options.steps + 1,
        "per_device_train_batch_size": options.batch_size * (1 if name == "dpo_fast" else _pairs_a_group(options)),
        **({"train_sampling_strategy": "sequential"} if options.group_size > 2 else {}),
        "learning_rate": 1e-6,
        "optim": "adamw_torch_fused",
        "gradient_checkpointing": False,
        "logging_steps": 1,
        "report_to": [],
        "save_strategy": "no",
        "disable_tqdm": True,
        "bf16": options.precision == "bf16",
        "use_cpu": not torch.cuda.is_available(),
        "dataloader_pin_memory": torch.cuda.is_available(),
        "precompute_ref_log_probs": True,
    }


def _rows(options: argparse.Namespace):
    """The first rows that fill all steps, as prompt, chosen and rejected messages: a form that every trainer reads."""
    from datasets import Dataset, DatasetDict
    from transformers import AutoTokenizer

    from dpo_fast.data import prepare_dataset
    from dpo_fast.formats import detect_format
    from dpo_fast.loading import load_preference_dataset

    dataset = load_preference_dataset(options.dataset)
    if isinstance(dataset, DatasetDict):
        dataset = dataset["train"]
    read = detect_format(dataset.column_names).read
    rows = []
    for row in dataset:
        example = read(row)
        if options.group_size > 2 and (
            len(example.completions) != options.group_size or len(example.comparisons) != _pairs_a_group(options)
        ):
            continue
        for winner, loser in example.comparisons:
            rows.append(
                {
                    "prompt": example.prompt,
                    "chosen": example.completions[winner],
                    "rejected": example.completions[loser],
                }
            )
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    needed = (options.steps + 1) * options.batch_size * _pairs_a_group(options)
    usable = needed
    while True:  # rows whose prompt fills max_length are dropped by both sides
        chosen = Dataset.from_list(rows[:usable])
        prepared, _ = prepare_dataset(chosen, tokenizer, max_length=options.max_length, name="benchmark")
        if len(prepared) >= needed:
            return chosen
        if usable >= len(rows):
            sys.exit(f"--steps {options.steps} needs {needed} usable pairs; {options.dataset} has {len(prepared)}")
        usable += needed - len(prepared)


def _peft_config(options: argparse.Namespace):
    if not options.lora:
        return None
    from peft import LoraConfig

    return LoraConfig(r=16, lora_alpha=32, lora_dropout=0.0, target_modules="all-linear", task_type="CAUSAL_LM")


def _counted(collator, count, tokens: list[int]):
    def collate(rows):
        batch = collator(rows)
        tokens.append(count(batch))
        return batch

    return collate


def _dpo_fast(options: argparse.Namespace, folder: str, tokens: list[int]):
    from dpo_fast.config import DPOConfig
    from dpo_fast.trainer import DPOTrainer

    trainer = DPOTrainer(
        options.model,
        args=DPOConfig(
            **_arguments(options, folder, "dpo_fast"),
            reference_cache_dir=str(Path(folder, "reference")),
            group_by_prompt=options.group_size > 2,
        ),
        train_dataset=_rows(options),
        peft_config=_peft_config(options),
    )
    trainer.data_collator = _counted(
        trainer.data_collator, lambda batch: sum(p.input_ids.numel() for p in batch["packs"]), tokens
    )
    return trainer


def _trl(options: argparse.Namespace, folder: str, tokens: list[int]):
    import torch
    import trl
    from transformers.utils import is_flash_attn_2_available

    flash = torch.cuda.is_available() and is_flash_attn_2_available() and options.precision == "bf16"
    trainer = trl.DPOTrainer(
        options.model,
        args=trl.DPOConfig(
            **_arguments(options, folder, "trl"),
            model_init_kwargs={"attn_implementation": "flash_attention_2" if flash else "sdpa"},
        ),
        train_dataset=_rows(options),
        peft_config=_peft_config(options),
    )
    trainer.data_collator = _counted(trainer.data_collator, lambda batch: batch["input_ids"].numel(), tokens)
    return trainer


_TRAINERS = {"dpo_fast": _dpo_fast, "trl": _trl}


def _reset_peak_memory(torch) -> None:
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    else:
        Path("/proc/self/clear_refs").write_text("5")  # the kernel's peak of resident memory starts anew


def _peak_memory(torch) -> int:
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024


def _check_losses(reports: dict[str, dict[str, Any]], tolerance: float) -> None:
    (name, ours), (other, theirs) = reports.items()
    for step, (a, b) in enumerate(zip(ours["losses"], theirs["losses"], strict=True)):
        if abs(a - b) > tolerance * abs(b):
            sys.exit(f"step {step}: {name} has loss {a}, {other} has {b}; what computes something else is not timed")


def _summary(options: argparse.Namespace, reports: dict[str, dict[str, Any]]) -> dict[str, Any]:
    pairs = options.batch_size * _pairs_a_group(options)
    sides = {}
    for name, report in reports.items():
        sides[name] = {
            "pairs_per_second": pairs * len(report["seconds"]) / sum(report["seconds"]),
            "seconds_per_step": spread(report["seconds"]),
            "peak_memory_gib": report["peak_memory_gib"],
            "token_positions": sum(report["token_positions"]),
            "seconds_before_training": report["seconds_before_training"],
            "losses": report["losses"],
        }
    ours, theirs = sides["dpo_fast"], sides[options.against]
    ratios = [b / a for a, b in zip(reports["dpo_fast"]["seconds"], reports[options.against]["seconds"], strict=True)]
    differences = [abs(a - b) / abs(b) for a, b in zip(ours["losses"], theirs["losses"], strict=True)]
    return {
        "question": "pairs per second of a training step, same settings on both sides",
        "speedup": ours["pairs_per_second"] / theirs["pairs_per_second"],
        "speedup_per_step": spread(ratios),
        "memory_ratio": ours["peak_memory_gib"] / theirs["peak_memory_gib"],
        "largest_loss_difference": max(differences),
        "settings": {
            **{key: value for key, value in vars(options).items() if key != "no_result"},
            "dataset": Path(options.dataset).name,
            "model": Path(options.model).name,
        },
        "sides": sides,
        "environment": environment(),
    }


def _print_table(result: dict[str, Any]) -> None:
    print(f"{'':12}{'pairs/s':>10}{'s/step':>10}{'p20–p80':>16}{'peak GiB':>10}{'positions':>11}")
    for name, side in result["sides"].items():
        step = side["seconds_per_step"]
        print(
            f"{name:12}{side['pairs_per_second']:10.4f}{step['median']:10.2f}"
            f"{step['p20']:9.2f}–{step['p80']:<6.2f}{side['peak_memory_gib']:10.2f}{side['token_positions']:11d}"
        )
    print(
        f"speed-up {result['speedup']:.2f}×, peak memory {result['memory_ratio']:.2f}×, "
        f"largest relative difference of a loss {result['largest_loss_difference']:.1e}"
    )


if __name__ == "__main__":
    main()
