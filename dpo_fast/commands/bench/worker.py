"""A trainer in a process of its own, which runs a step whenever it is told to: the far end of `turns.Side`.

For every `Job` it builds the trainer, answers `READY`, then runs one optimizer step for each `STEP` that it is sent and
answers with the seconds that it took, and in the end sends a `Report`. What goes wrong is sent as a `Failure`; the
process then waits for the next job.
"""

from __future__ import annotations

import gc
import os
import time
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from multiprocessing.connection import Connection
from typing import Any

import datasets
import torch
from accelerate.utils.memory import should_reduce_batch_size
from datasets import Dataset
from torch import nn
from transformers import PrinterCallback, Trainer, TrainerCallback
from transformers.utils import is_flash_attn_2_available
from transformers.utils import logging as transformers_logging

from dpo_fast.commands.arguments import TrainArguments, parse_train_arguments
from dpo_fast.config import DPOConfig
from dpo_fast.machine import peak_memory, reset_peak_memory

STEP, READY = "step", "ready"  # what is sent besides


@dataclass(frozen=True)
class Job:
    """What to train: which trainer (a key of `_TRAINERS`), flags of `dpo-fast train`, the folder of prepared rows."""

    trainer: str
    flags: Sequence[str]
    rows: str


@dataclass(frozen=True)
class Report:
    """What a run of one trainer came to; the first step warms up, and only `losses` has it.

    Attributes:
        losses: of every step.
        seconds: of every step after the first.
        positions: token positions that went through the model in these steps, padding included.
        peak_memory: bytes; of the allocator on a GPU, resident memory of the process on a CPU.
        layout: how our trainer laid its batches out; None for another trainer.
    """

    losses: list[float]
    seconds: list[float]
    positions: list[int]
    peak_memory: int
    layout: str | None


@dataclass(frozen=True)
class Failure:
    """Why a job came to nothing; `refused` when the trainer does not take these arguments or rows."""

    message: str
    out_of_memory: bool = False
    refused: bool = False


def work(pipe: Connection) -> None:
    """Runs jobs until the pipe closes."""
    _be_quiet()

    while True:
        try:
            job = pipe.recv()
        except EOFError:
            return
        try:
            answer: Report | Failure = _run(job, pipe)
        except EOFError:  # nobody waits for this job any more
            return
        except Exception as error:
            out_of_memory = should_reduce_batch_size(error) or isinstance(error, MemoryError)
            refused = isinstance(error, ValueError | ImportError)
            if not out_of_memory and not refused:
                traceback.print_exc()
            answer = Failure(f"{type(error).__name__}: {' '.join(str(error).split())}", out_of_memory, refused)
        pipe.send(answer)
        _free_memory()


def _be_quiet() -> None:
    """Leaves the terminal to the process that compares: only warnings of our own and tracebacks pass."""
    os.environ["TQDM_DISABLE"] = "1"
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    datasets.disable_progress_bars()
    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()


def _free_memory() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _run(job: Job, pipe: Connection) -> Report:
    trainer = _TRAINERS[job.trainer](parse_train_arguments(list(job.flags)), datasets.load_from_disk(job.rows))
    trainer.remove_callback(PrinterCallback)
    turns = _TakeTurns(pipe, trainer.model)
    trainer.add_callback(turns)
    trainer.train()
    return Report(
        losses=[row["loss"] for row in trainer.state.log_history if "loss" in row],
        seconds=turns.seconds[1:],
        positions=turns.positions[1:],
        peak_memory=peak_memory(),
        layout=getattr(trainer, "layout", None),
    )


class _TakeTurns(TrainerCallback):
    """Waits for its turn before every step; the clock runs from there to the end of the step."""

    def __init__(self, pipe: Connection, model: nn.Module):
        self.seconds: list[float] = []
        self.positions: list[int] = []
        self._pipe, self._model, self._began, self._run_through = pipe, model, 0.0, 0

    def _count(self, module: nn.Module, inputs: Any, embedded: torch.Tensor) -> None:
        self._run_through += embedded.shape[:-1].numel()

    def _wait(self) -> None:
        if self._pipe.recv() != STEP:
            raise EOFError
        self._run_through, self._began = 0, time.perf_counter()

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        self._model.get_input_embeddings().register_forward_hook(self._count)
        reset_peak_memory()
        self._pipe.send(READY)
        self._wait()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.seconds.append(time.perf_counter() - self._began)
        self.positions.append(self._run_through)
        self._pipe.send(self.seconds[-1])
        if state.global_step < state.max_steps:
            self._wait()


# ---- trainers ----


def _dpo_fast(arguments: TrainArguments, rows: Dataset) -> Trainer:
    from dpo_fast.trainer import DPOTrainer

    return DPOTrainer(args=arguments.config, train_dataset=rows, **_model_arguments(arguments))


def _trl(arguments: TrainArguments, rows: Dataset) -> Trainer:
    """TRL's trainer at its best: with precomputed references, and flash-attn where that is installed.

    It gets the tokens that our preparation made, a pair for each comparison of a group.
    """
    import trl

    class DPOTrainer(trl.DPOTrainer):
        def _prepare_dataset(self, dataset: Dataset, *args: Any, **kwargs: Any) -> Dataset:
            return dataset

    config = arguments.config
    known = {field.name for field in fields(trl.DPOConfig) if field.init}
    options = {field.name: getattr(config, field.name) for field in fields(config) if field.name in known}
    options["precompute_ref_log_probs"] = True
    options["per_device_train_batch_size"] *= len(rows[0]["comparisons"])
    options["model_init_kwargs"] = _fastest_attention(config) | config.model_init_kwargs
    pairs = rows.map(_pairs, batched=True, remove_columns=rows.column_names)
    return DPOTrainer(args=trl.DPOConfig(**options), train_dataset=pairs, **_model_arguments(arguments))


def _model_arguments(arguments: TrainArguments) -> dict[str, Any]:
    return {
        "model": arguments.model.model_name_or_path,
        "quantization_config": arguments.model.quantization_config(),
        "peft_config": arguments.model.peft_config(),
    }


def _fastest_attention(config: DPOConfig) -> dict[str, str]:
    """flash-attn where it can run; else transformers chooses."""
    half = config.bf16 or config.fp16
    usable = half and config.device.type == "cuda" and is_flash_attn_2_available()
    return {"attn_implementation": "flash_attention_2"} if usable else {}


def _pairs(groups: Mapping[str, list]) -> dict[str, list]:
    pairs: dict[str, list] = {"prompt_ids": [], "chosen_ids": [], "rejected_ids": []}
    columns = (groups[name] for name in ("prompt_ids", "completion_ids", "comparisons"))
    for prompt, completions, comparisons in zip(*columns, strict=True):
        for winner, loser in comparisons:
            pairs["prompt_ids"].append(prompt)
            pairs["chosen_ids"].append(completions[winner])
            pairs["rejected_ids"].append(completions[loser])
    return pairs


_TRAINERS = {"dpo_fast": _dpo_fast, "trl": _trl}
