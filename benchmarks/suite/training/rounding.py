"""How far are a completion's bf16 log-probs from fp32's, and does it matter what it is packed with?

    python benchmarks/run.py rounding --dataset pairs.json --max_length 1024 --out DIR

Weights are fp32 and layers run under autocast, as in training. Each way of running the same pairs is held to fp32:

    packed        all pairs of a batch in one pack
    packed alone  every pair in a pack of its own
    padded        all pairs as rows padded to the longest, logits rounded to bf16, as trainers of pairs run them
    padded alone  every pair as two rows

A reference pass and a training step may run a completion in different company, so between two ways of a kind lies what
bf16 adds to a reward. A loss at equal weights is then ln 2 on average only: over B pairs its standard deviation is
β/2 · (that of a margin) / √B, which is what bf16 losses of two trainers may be compared to.

The last line printed is one JSON object; the same goes to --out. No timing.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dpo_fast import PreferenceGroup, add_dpo_forward, pack, use_shared_prefix
from dpo_fast.commands.bench.trainers import pairs_of
from suite.harness.results import RESULTS, environment, write_result
from suite.training.models import build_model, model_config
from suite.training.providers import SequenceLogProbs, padded_pairs
from suite.training.workloads import Group, dataset_groups

BETA = 0.1
Run = Callable[[Sequence[Group]], Tensor]  # groups → log-probs of their completions, [2B]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", required=True, help="hub name, file or folder, in any format of dpo-fast train")
    parser.add_argument("--model", help="name or path; the demo's model when left out")
    parser.add_argument("--max_length", type=int, default=1024)
    parser.add_argument("--batch_size", type=int, default=8, help="pairs of a batch")
    parser.add_argument("--batches", type=int, default=8)
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()

    from transformers import AutoTokenizer

    from dpo_fast.commands.demo.model import demo_model

    model = options.model or str(demo_model())
    groups = dataset_groups(
        options.dataset,
        options.batch_size * options.batches,
        group_size=2,
        max_length=options.max_length,
        tokenizer=AutoTokenizer.from_pretrained(model),
        vocab_size=model_config(model).get_text_config().vocab_size,
    )
    batches = [groups[start : start + options.batch_size] for start in range(0, len(groups), options.batch_size)]
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    packed, padded = _packed_run(model, device), _padded_run(model, device)
    truth = _over(batches, packed)
    ways = {}
    for name, run in (("packed", packed), ("padded", padded)):
        with torch.autocast(device.type, torch.bfloat16):
            ways[name] = _over(batches, run)
            ways[f"{name} alone"] = _over([[group] for group in groups], run)
    result = {
        "question": "rounding of log-probs in bf16",
        "error_of_a_completion_nat": {name: _rms(logps - truth) for name, logps in ways.items()},
        "mean_error_nat": {name: (logps - truth).mean().item() for name, logps in ways.items()},
        "between_batch_and_alone": {name: _between(ways, name, options.batch_size) for name in ("packed", "padded")},
        "settings": {**vars(options), "model": Path(model).name, "dataset": Path(options.dataset).name, "out": None},
        "environment": environment(),
    }
    result["summary"] = _summary(result, options.batch_size)
    print("\n".join(result["summary"]))
    path = write_result(f"rounding-bf16-len{options.max_length}-b{options.batch_size}", result, options.out)
    print(json.dumps({"file": str(path), "error_of_a_completion_nat": result["error_of_a_completion_nat"]}))


def _summary(result: dict[str, Any], batch_size: int) -> list[str]:
    lines = [
        f"{name:13} off fp32 by {error:.3f} nat (RMS)" for name, error in result["error_of_a_completion_nat"].items()
    ]
    for name, found in result["between_batch_and_alone"].items():
        lines.append(
            f"{name}, in a batch against alone: margins differ by {found['margin_nat']:.3f} nat (RMS), a loss of "
            f"{batch_size} pairs at equal weights is off ln 2 by {found['loss']:.4f} (standard deviation)"
        )
    return lines


def _packed_run(name: str, device: torch.device) -> Run:
    model = build_model(name, dtype=torch.float32, device=device, attention=None).to(device).eval()
    add_dpo_forward(model)
    use_shared_prefix(model)

    def run(groups: Sequence[Group]) -> Tensor:
        packed = pack([PreferenceGroup(group["prompt_ids"], group["completion_ids"]) for group in groups])
        return model(packed=packed.to(device)).logps

    return run


def _padded_run(name: str, device: torch.device) -> Run:
    model = SequenceLogProbs(build_model(name, dtype=torch.float32, device=device, attention="sdpa").to(device).eval())

    def run(groups: Sequence[Group]) -> Tensor:
        chosen, rejected = model(*(part.to(device) for part in padded_pairs(pairs_of(groups)))).chunk(2)
        return torch.stack([chosen, rejected], dim=1).flatten()

    return run


@torch.no_grad()
def _over(batches: Sequence[Sequence[Group]], run: Run) -> Tensor:
    return torch.cat([run(groups).double().cpu() for groups in batches])


def _rms(values: Tensor) -> float:
    return values.square().mean().sqrt().item()


def _between(ways: dict[str, Tensor], name: str, batch_size: int) -> dict[str, float]:
    margins = (ways[name] - ways[f"{name} alone"]).view(-1, 2).diff(dim=1)
    return {"margin_nat": _rms(margins), "loss": BETA / 2 * _rms(margins) / batch_size**0.5}
