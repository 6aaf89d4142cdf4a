"""What should one H200 take? Counted before anything is measured, by one rule for every figure.

    python benchmarks/run.py predict [--write]

    products    counted FLOP at 790 TFLOP/s, what an 8192³ bf16 product reaches there
    bytes       counted bytes of everything that is no product, at 4.3 TB/s, what a copy reaches there
    expected    both added up, as if nothing overlapped; attention at the share of the first that FlashAttention-2
                reaches on Hopper

These are predictions, not measurements. Counted are: the head's products and passes over logits and dW by strategy; in
training the products, attention, elementwise work of the layers per position, and casts, clipping and AdamW per
parameter. Not counted: launches, host time, a product of few rows being slower than a large one.

--write puts them into `benchmarks/predictions.json`, from which `run.py summary` prints them beside what was measured.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from types import SimpleNamespace

import torch

from suite.harness.summary import PREDICTIONS, prediction_table
from suite.ops.attention import BATCHES, MODELS, duplicated_groups, visible_pairs
from suite.ops.head_problem import SHAPES
from suite.ops.head_providers import DEFAULT_BUDGET, PROVIDERS
from suite.ops.rows import PASSES
from suite.training import layout
from suite.training.models import model_config, model_parameters, step_flops, unique_tokens
from suite.training.setting import Setting
from suite.training.workloads import synthetic_groups

HARDWARE, FLOPS, BYTES = "h200", 790e12, 4.3e12
ATTENTION = 0.44  # of FLOPS: published FlashAttention-2 on Hopper, about 350 TFLOP/s
# Bytes of elementwise work in a 1 B Llama's layers under autocast, forward and backward, by what fuses it: docs/LOG.md
# counts them for 7 574 positions. 12 GB of each are casts of weights and gradients, which stand below.
LAYERS = {"none": 169.6e9, "liger": 80.4e9, "compile": 52.5e9}
_CASTS, _POSITIONS = 12e9, 7574
# Bytes per parameter in fp32: AdamW reads four and writes three, clipping reads two and writes one, and two casts.
OPTIMIZER = 28 + 12 + 6 + 6
_LOGIT = {"fp32": 4, "bf16": 2}


@dataclass(frozen=True)
class Prediction:
    """A figure, what it must compute and move, and the milliseconds that follow."""

    figure: str
    tflop: float
    gb: float
    ms_flop: float
    ms_bytes: float
    expected_ms: float


def predict(figure: str, flop: float, moved: float, attention: float = 0.0) -> Prediction:
    """Return a prediction from FLOP of products, bytes of the rest, and FLOP of attention."""
    ms_flop, ms_bytes = 1e3 * (flop + attention) / FLOPS, 1e3 * moved / BYTES
    slower = 1e3 * attention / FLOPS * (1 / ATTENTION - 1)
    numbers = ((flop + attention) / 1e12, moved / 1e9, ms_flop, ms_bytes, ms_flop + ms_bytes + slower)
    return Prediction(figure, *(float(f"{number:.4g}") for number in numbers))


def predictions() -> list[Prediction]:
    return [*ceilings(), *training(), *head(), *attention(), *rows(), *layouts()]


def ceilings() -> Iterator[Prediction]:
    yield predict("ceilings, product", 2 * 8192**3, 0)
    yield predict("ceilings, copy", 0, 2 * 8e9)


# ---- the head ----

# Passes over logits beside the products, in bytes per logit: fp32 logits are read once for log-probs and once for D,
# which is written in bf16. TRL's logits are bf16. Plain PyTorch casts, normalises, and takes all of it back.
_PASSES = {
    "preference": {"trainable": 10, "frozen": 10},
    "kept": {"trainable": 10},
    "recomputed": {"trainable": 14},
    "forward": {"forward": 4},
    "fused": {"forward": 0},
    "trl": {"trainable": 6, "frozen": 6, "forward": 2},
    "plain": {"trainable": 36, "frozen": 36, "forward": 14},
    "untiled": {"trainable": 0, "frozen": 0, "forward": 0},
}
_TRL_ROWS = 4096  # of its tiles


def head() -> Iterator[Prediction]:
    shape = SHAPES["llama-3-8b"]
    tile = DEFAULT_BUDGET // (6 * shape.vocabulary) // 128 * 128
    for count in (8192, 16384):
        tiles = {"preference": -(-count // tile), "recomputed": -(-count // tile), "trl": -(-count // _TRL_ROWS)}
        for name, modes in _PASSES.items():
            for mode, passes in modes.items():
                flop = PROVIDERS[name].products[mode] * 2 * count * shape.hidden * shape.vocabulary
                moved = passes * count * shape.vocabulary
                if mode == "trainable":  # fp32 dW is read and written for every tile
                    moved += 8 * tiles.get(name, 0) * shape.hidden * shape.vocabulary
                yield predict(f"head, llama-3-8b {count}, {mode} {name}", flop, moved)


def rows() -> Iterator[Prediction]:
    for dtype, size in _LOGIT.items():
        one_pass = 2048 * SHAPES["llama-3-8b"].vocabulary * size
        for mode in ("forward", "backward", "forward+backward"):
            yield predict(f"rows, llama-3-8b {dtype}, {mode} triton", 0, PASSES[mode] * one_pass)


def attention() -> Iterator[Prediction]:
    heads, _, width = MODELS["llama-3-8b"]
    for batch, groups in BATCHES.items():
        for name, counted in (("triton", groups), ("varlen", groups), ("duplicated", duplicated_groups(groups))):
            flop = 14 * visible_pairs(counted) * heads * width
            yield predict(f"attention, llama-3-8b, {batch}, {name}", 0, 0, flop)


# ---- training ----


def training() -> Iterator[Prediction]:
    """The mean of the timed steps of `run.py speed` at its settings in `make gpu`, and of fewer in `make gpu-more`."""
    config = model_config("llama-3.2-1b")
    setting = Setting("dpo_fast", "llama-3.2-1b", micro_batch=8)
    count = setting.rows * setting.all_steps
    groups = synthetic_groups("ultrafeedback", count, group_size=2, max_length=2048, vocab_size=config.vocab_size)
    timed = [groups[start : start + 8] for start in range(8, 8 * (1 + setting.steps), 8)]
    yield step("training, dpo_fast", config, timed, padded=False, head_passes=10, head_products=3)
    yield step("training, trl", config, timed, padded=True, head_passes=6, head_products=4)
    for layers in ("compile", "liger"):
        name = f"layers, {layers}"
        yield step(name, config, timed[:4], padded=False, head_passes=10, head_products=3, layers=layers)


def layouts() -> Iterator[Prediction]:
    options = SimpleNamespace(size="1b", steps=10, batch_size=4, max_length=2048)
    pairs = [
        {"prompt_ids": row["prompt_ids"], "completion_ids": [row["chosen_ids"], row["rejected_ids"]]}
        for row in layout.synthetic_pairs(options)
    ]
    timed = [pairs[start : start + 4] for start in range(4, len(pairs), 4)]
    for name in ("shared", "padded"):
        config = layout.model_config(options.size)
        yield step(f"layout, {name}", config, timed, padded=name == "padded", head_passes=10, head_products=3)


def step(
    figure: str,
    config: object,
    steps: Sequence[Sequence[Mapping]],
    *,
    padded: bool,
    head_passes: int,
    head_products: int,
    layers: str = "none",
) -> Prediction:
    """Return the prediction of a mean step: rows padded to the longest of their step, or each token once."""
    body, head_weights, parameters = model_parameters(config)
    flop = moved = attended = 0.0
    for groups in steps:
        rows = [len(group["prompt_ids"]) + len(c) for group in groups for c in group["completion_ids"]]
        scored = sum(len(c) for group in groups for c in group["completion_ids"])
        positions = len(rows) * max(rows) if padded else sum(map(unique_tokens, groups))
        products = 6 * body * positions + 2 * head_products * head_weights * scored
        unique = 6 * (body * sum(map(unique_tokens, groups)) + head_weights * scored)
        shared = step_flops(config, groups, frozen=False) - unique
        width = 12 * config.num_hidden_layers * config.hidden_size
        attended += width * len(rows) * max(rows) ** 2 / 2 if padded else shared
        flop += products
        moved += (LAYERS[layers] - _CASTS) / _POSITIONS * positions
        moved += OPTIMIZER * parameters + head_passes * config.vocab_size * scored
    return predict(figure, flop / len(steps), moved / len(steps), attended / len(steps))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="into benchmarks/predictions.json")
    options = parser.parse_args()
    torch.set_num_threads(1)
    found = {"hardware": HARDWARE, "flops": FLOPS, "bytes": BYTES, "figures": [asdict(each) for each in predictions()]}
    print("\n".join(prediction_table(found, {})))
    if options.write:
        PREDICTIONS.write_text(json.dumps(found, indent=1) + "\n")
