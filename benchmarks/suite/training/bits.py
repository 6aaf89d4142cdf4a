"""Do three short trainings still end with the same bits? Run it before and after a change that should change no number.

    full    every weight, pairs, packs under a token bound
    lora    an adapter, pairs, a reference without it
    ranked  four ranked completions per prompt, all comparisons, LD-DPO

A line per training: losses, gradient norms, and a hash of all weights. Equal lines are equal runs.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import random
import tempfile
from pathlib import Path

import torch
from datasets import Dataset
from peft import LoraConfig
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from dpo_fast import DPOConfig, DPOTrainer

VOCABULARY = 256


def tokenizer() -> PreTrainedTokenizerFast:
    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(VOCABULARY)}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=words, unk_token="w0", eos_token="w1", pad_token="w2")


def rows(completions: int, count: int = 48) -> Dataset:
    """Return prompts of 5 to 40 words with completions of 1 to 40, in the pair or the ranked format."""
    draw = random.Random(0)

    def text(shortest: int) -> str:
        return " ".join(f"w{draw.randrange(3, VOCABULARY)}" for _ in range(draw.randint(shortest, 40)))

    if completions == 2:
        return Dataset.from_list([{"prompt": text(5), "chosen": text(1), "rejected": text(1)} for _ in range(count)])
    return Dataset.from_list(
        [
            {
                "prompt": text(5),
                "completions": [text(1) for _ in range(completions)],
                "scores": [draw.random() for _ in range(completions)],
            }
            for _ in range(count)
        ]
    )


TRAININGS = {
    "full": (2, {"max_tokens_per_micro_batch": 256}, None),
    "lora": (2, {"loss_type": ["ipo"]}, {"r": 4, "target_modules": ["q_proj", "v_proj"]}),
    "ranked": (4, {"ld_alpha": 0.5, "gradient_accumulation_steps": 2}, None),
}


def train(name: str) -> dict[str, object]:
    """Run one training of 12 steps and return its losses, gradient norms and a hash of its weights."""
    completions, options, adapter = TRAININGS[name]
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
        )
    )
    with tempfile.TemporaryDirectory() as folder:
        trainer = DPOTrainer(
            model,
            args=DPOConfig(
                output_dir=folder,
                reference_cache_dir=str(Path(folder, "reference")),
                max_steps=12,
                per_device_train_batch_size=4,
                learning_rate=1e-3,
                logging_steps=1,
                save_strategy="no",
                report_to="none",
                use_cpu=True,
                disable_tqdm=True,
                seed=7,
                **options,
            ),
            train_dataset=rows(completions),
            processing_class=tokenizer(),
            peft_config=LoraConfig(**adapter) if adapter else None,
        )
        trainer.train()
    weights = hashlib.sha256()
    for key, value in sorted(trainer.model.state_dict().items()):
        weights.update(key.encode() + value.detach().contiguous().numpy().tobytes())
    steps = [row for row in trainer.state.log_history if "loss" in row]
    return {
        "training": name,
        "weights": weights.hexdigest(),
        "losses": [row["loss"].hex() for row in steps],
        "gradient_norms": [float(row["grad_norm"]).hex() for row in steps],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="write the lines here too")
    out = parser.parse_args().out
    torch.set_num_threads(1)
    lines = [json.dumps(train(name)) for name in TRAININGS]
    print(*lines, sep="\n")
    if out is not None:
        out.write_text("\n".join(lines) + "\n")
