"""Small preference data, and trainers of tiny models on them."""

from __future__ import annotations

from pathlib import Path

import torch
from datasets import Dataset

from dpo_fast.config import DPOConfig
from dpo_fast.trainer import DPOTrainer
from families import VOCAB, tiny_model, tiny_tokenizer


def words(count: int, generator: torch.Generator) -> str:
    return " ".join(f"w{i}" for i in torch.randint(3, VOCAB, (count,), generator=generator).tolist())


def pairs(count: int = 16, seed: int = 0) -> Dataset:
    """Rows of text whose lengths differ a lot."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(2, 14, (count, 3), generator=generator).tolist()
    columns = zip(*([words(n, generator) for n in row] for row in lengths), strict=True)
    rows = dict(zip(("prompt", "chosen", "rejected"), columns, strict=True))
    return Dataset.from_dict(
        {name: [f" {text}" if name != "prompt" else text for text in v] for name, v in rows.items()}
    )


def ranked(count: int = 8, seed: int = 0) -> Dataset:
    """K = 3 or 4 completions a prompt with scores, some of them tied."""
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for index in range(count):
        completions = [" " + words(3 + 2 * k, generator) for k in range(3 + index % 2)]
        scores = torch.randint(0, 3, (len(completions) - 1,), generator=generator).tolist()
        rows.append({"prompt": words(4 + index, generator), "completions": completions, "scores": [3.0, *scores]})
    return Dataset.from_list(rows)


def make_trainer(tmp_path: Path, dataset: Dataset | None = None, *, model=None, **options) -> DPOTrainer:
    trainer_options = {
        name: options.pop(name)
        for name in ("eval_dataset", "peft_config", "ref_model", "compute_metrics")
        if name in options
    }
    args = DPOConfig(
        **{
            "output_dir": str(tmp_path / "out"),
            "reference_cache_dir": str(tmp_path / "reference"),
            "use_cpu": True,
            "report_to": [],
            "max_steps": 3,
            "per_device_train_batch_size": 4,
            "learning_rate": 1e-3,
            "logging_steps": 1,
            "save_strategy": "no",
            "gradient_checkpointing": False,
            "disable_tqdm": True,
            "max_length": 64,
            **options,
        }
    )
    return DPOTrainer(
        model=model or tiny_model("llama"),
        args=args,
        train_dataset=pairs() if dataset is None else dataset,
        processing_class=tiny_tokenizer(),
        **trainer_options,
    )


def trained(trainer: DPOTrainer, **options) -> dict[str, torch.Tensor]:
    trainer.train(**options)
    return {name: p.detach().clone() for name, p in trainer.model.named_parameters() if p.requires_grad}


def logged(trainer: DPOTrainer, key: str) -> list[float]:
    return [row[key] for row in trainer.state.log_history if key in row]


def assert_same_weights(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor], tolerance: float) -> None:
    assert a.keys() == b.keys()
    for name in a:
        error = (a[name] - b[name]).abs().max().item()
        assert error <= tolerance, f"{name} differs by {error:.2e}"
