"""What does the shared layout gain over padded rows, all else equal?

    python benchmarks/run.py layout --size 1b --steps 20 --out results

Trains a randomly initialised Llama of the given size on synthetic pairs, in bf16 on a GPU and fp32 on a CPU, once in
each layout: same weights, rows, order and seed. Where losses differ, the figures are written as disagreeing.
Lengths are log-normal around medians of 190 (prompt) and 300 (completion) tokens, as in real preference data.

The last line printed is one JSON object; a result file and a plot of the losses go to --out.
"""

from __future__ import annotations

import argparse
import gc
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from tokenizers import Tokenizer, models
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast, TrainerCallback

from dpo_fast import DPOConfig, DPOTrainer
from dpo_fast.machine import peak_memory, reset_peak_memory
from suite.harness.results import RESULTS, environment, spread, write_result

SIZES = {
    "tiny": {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4},
    "1b": {
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
    },
}
VOCABULARY = {"tiny": 1000, "1b": 128256}
LOSS_TOLERANCE = {"fp32": 1e-3, "bf16": 5e-2}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="1b" if torch.cuda.is_available() else "tiny")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--batch_size", type=int, default=4)
    parser.add_argument("--max_length", type=int, default=2048)
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()

    precision = "bf16" if torch.cuda.is_available() else "fp32"
    rows = synthetic_pairs(options)
    reports = {layout: train(layout, rows, options) for layout in ("shared", "padded")}
    shared, padded = reports["shared"], reports["padded"]
    differences = [abs(a - b) / abs(b) for a, b in zip(shared["losses"], padded["losses"], strict=True)]
    disagrees = not max(differences) <= LOSS_TOLERANCE[precision]
    result = {
        "question": "pairs per second, shared against padded layout, all else equal",
        "speedup": shared["pairs_per_second"] / padded["pairs_per_second"],
        "memory_ratio": shared["peak_memory_gib"] / padded["peak_memory_gib"] if padded["peak_memory_gib"] else None,
        "largest_loss_difference": max(differences),
        "disagrees": disagrees,
        "precision": precision,
        "settings": {name: str(value) for name, value in vars(options).items()},
        "layouts": reports,
        "environment": environment(),
    }
    result["summary"] = [
        f"{layout:8}{report['pairs_per_second']:10.3f} pairs/s{report['seconds_per_step']['median']:9.3f} s/step"
        f"{report['peak_memory_gib']:9.2f} GiB   first loss {report['losses'][0]:.6f}{'≠' if disagrees else ''}"
        for layout, report in reports.items()
    ]
    path = write_result(
        f"layout-{options.size}-{precision}-len{options.max_length}-b{options.batch_size}", result, options.out
    )
    plot(reports, path.with_suffix(".png"))
    print("\n".join(result["summary"]))
    print(json.dumps({"speedup": result["speedup"], "memory_ratio": result["memory_ratio"], "file": str(path)}))
    if disagrees:
        raise SystemExit(f"the layouts disagree: losses {shared['losses']} against {padded['losses']}")


def model_config(size: str) -> LlamaConfig:
    return LlamaConfig(**SIZES[size], vocab_size=VOCABULARY[size], max_position_embeddings=8192)


def synthetic_pairs(options: argparse.Namespace) -> Dataset:
    """Return token ids of pairs that fill all steps, one warm-up step included."""
    generator = torch.Generator().manual_seed(0)
    scale = options.max_length / 2048

    def ids(median: float) -> list[int]:
        length = median * scale * torch.randn(1, generator=generator).mul(0.8).exp().item()
        length = max(2, min(int(length), options.max_length // 2 - 1))
        return torch.randint(3, VOCABULARY[options.size], (length,), generator=generator).tolist()

    count = (options.steps + 1) * options.batch_size
    return Dataset.from_list(
        [{"prompt_ids": ids(190), "chosen_ids": ids(300), "rejected_ids": ids(320)} for _ in range(count)]
    )


def train(layout: str, rows: Dataset, options: argparse.Namespace) -> dict[str, Any]:
    """Train one model in one layout and return what was measured."""
    torch.manual_seed(0)
    config = model_config(options.size)
    cuda = torch.cuda.is_available()
    device = torch.device("cuda" if cuda else "cpu")
    with device:
        model = AutoModelForCausalLM.from_config(config)
    clock: list[float] = []

    class Clock(TrainerCallback):
        def on_step_end(self, *args, **kwargs):
            if cuda:
                torch.cuda.synchronize()
            clock.append(time.perf_counter())

    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel({"<eos>": 0})), eos_token="<eos>", pad_token="<eos>"
    )
    with tempfile.TemporaryDirectory() as folder:
        trainer = DPOTrainer(
            model,
            args=DPOConfig(
                output_dir=folder,
                reference_cache_dir=folder,
                layout=layout,
                max_length=options.max_length,
                max_steps=options.steps + 1,
                per_device_train_batch_size=options.batch_size,
                learning_rate=1e-6,
                gradient_checkpointing=False,
                logging_steps=1,
                save_strategy="no",
                report_to=[],
                disable_tqdm=True,
                dataloader_pin_memory=cuda,
                optim="adamw_torch_fused",
            ),
            train_dataset=rows,
            processing_class=tokenizer,
            callbacks=[Clock()],
        )
        if cuda:
            reset_peak_memory(device)
        trainer.train()
    seconds = [b - a for a, b in zip(clock, clock[1:], strict=False)]
    report = {
        "losses": [row["loss"] for row in trainer.state.log_history if "loss" in row],
        "seconds_per_step": spread(seconds),
        "pairs_per_second": options.batch_size * len(seconds) / sum(seconds),
        "peak_memory_gib": peak_memory(device) / 2**30 if cuda else 0.0,
    }
    del trainer, model
    gc.collect()
    if cuda:
        torch.cuda.empty_cache()
    return report


def plot(reports: dict[str, dict[str, Any]], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(6, 4), layout="constrained")
    for (layout, report), style in zip(reports.items(), ("-", "--"), strict=True):
        axes.plot(report["losses"], style, label=f"{layout}, {report['pairs_per_second']:.2f} pairs/s")
    axes.set(xlabel="step", ylabel="loss", title="the same training in both layouts")
    axes.legend()
    figure.savefig(path, dpi=130)
