"""The trainers that `dpo-fast bench` compares, built from flags of `dpo-fast train` and a folder of prepared rows."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields
from typing import Any

from datasets import Dataset, load_from_disk
from transformers import Trainer
from transformers.utils import is_flash_attn_2_available

from dpo_fast.commands.arguments import TrainArguments, parse_train_arguments
from dpo_fast.commands.bench.worker import TrainingLoop, loop_of
from dpo_fast.config import DPOConfig


def dpo_fast(flags: Sequence[str], folder: str) -> TrainingLoop:
    from dpo_fast.trainer import DPOTrainer

    arguments = parse_train_arguments(list(flags))
    rows = load_from_disk(folder)
    trainer = DPOTrainer(args=arguments.config, train_dataset=rows, **_model_arguments(arguments))
    return loop_of(trainer, packed_positions, layout=trainer.layout)


def trl(flags: Sequence[str], folder: str) -> TrainingLoop:
    """Build TRL's trainer at its best: with precomputed references, and flash-attn where that is installed.

    It gets the tokens that our preparation made, a pair for each comparison of a group.
    """
    import trl

    arguments, rows = parse_train_arguments(list(flags)), load_from_disk(folder)
    config = arguments.config
    known = {field.name for field in fields(trl.DPOConfig) if field.init}
    options = {field.name: getattr(config, field.name) for field in fields(config) if field.name in known}
    options["precompute_ref_log_probs"] = True
    options["per_device_train_batch_size"] *= len(rows[0]["comparisons"])
    options["model_init_kwargs"] = _fastest_attention(config) | config.model_init_kwargs
    trainer = trl_trainer_of_tokens()(
        args=trl.DPOConfig(**options),
        train_dataset=Dataset.from_list(pairs_of(rows)),
        **_model_arguments(arguments),
    )
    return loop_of(trainer, padded_positions)


def trl_trainer_of_tokens() -> type[Trainer]:
    """Return TRL's trainer for rows that are token ids already."""
    import trl

    class DPOTrainer(trl.DPOTrainer):
        def _prepare_dataset(self, dataset: Dataset, *args: Any, **kwargs: Any) -> Dataset:
            return dataset

    return DPOTrainer


def pairs_of(groups: Iterable[Mapping[str, Any]]) -> list[dict[str, list[int]]]:
    """Return the comparisons of groups of token ids, each as a row of a trainer of pairs."""
    return [
        {
            "prompt_ids": group["prompt_ids"],
            "chosen_ids": group["completion_ids"][winner],
            "rejected_ids": group["completion_ids"][loser],
        }
        for group in groups
        for winner, loser in group["comparisons"]
    ]


def packed_positions(batch: Mapping[str, Any]) -> int:
    """Return the token positions of a micro-batch of ours."""
    return sum(packed.input_ids.numel() for packed in batch["packs"])


def padded_positions(batch: Mapping[str, Any]) -> int:
    """Return the token positions of a micro-batch of TRL's."""
    return batch["input_ids"].numel()


def _model_arguments(arguments: TrainArguments) -> dict[str, Any]:
    return {
        "model": arguments.model.model_name_or_path,
        "quantization_config": arguments.model.quantization_config(),
        "peft_config": arguments.model.peft_config(),
    }


def _fastest_attention(config: DPOConfig) -> dict[str, str]:
    """Return flash-attn where it can run; else nothing, so that transformers chooses."""
    half = config.bf16 or config.fp16
    usable = half and config.device.type == "cuda" and is_flash_attn_2_available()
    return {"attn_implementation": "flash_attention_2"} if usable else {}
