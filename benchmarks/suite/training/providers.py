"""The trainers of run.py speed.

All get the same token ids in the same order, seed, precision and optimizer (fused AdamW, linear decay, gradients
clipped at 1). All have their reference log-probs before the clock starts.

    dpo_fast   `dpo_fast.DPOTrainer`
    patch_trl  TRL's trainer as below, after `dpo_fast.patch_trl()`
    trl        TRL 1.16 at its fastest: precomputed references, flash-attn where it is installed, else PyTorch's SDPA
    plain      a loop without a trainer: padded rows, the model's logits, log-softmax, and as little else as it takes;
               rows are padded on the right, so it needs no mask but the causal one: nothing that counts sees padding
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from datasets import Dataset, load_from_disk
from tokenizers import Tokenizer, models
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel, PreTrainedTokenizerFast, set_seed
from transformers.utils import is_flash_attn_2_available

from dpo_fast.commands.bench.trainers import packed_positions, padded_positions, trl_trainer_of_tokens
from dpo_fast.commands.bench.worker import StepGate, TrainingLoop, loop_of
from suite.training.models import build_model
from suite.training.setting import Setting

BETA, MAX_GRAD_NORM, SEED = 0.1, 1.0, 42
Log = Sequence[Mapping[str, float]]  # loss and grad_norm of every step


def _device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def _model(setting: Setting) -> PreTrainedModel:
    bf16 = setting.precision == "bf16"
    flash = torch.cuda.is_available() and is_flash_attn_2_available() and bf16
    return build_model(
        setting.model,
        dtype=torch.bfloat16 if bf16 and setting.lora else torch.float32,
        device=_device(),
        attention=None if setting.provider == "dpo_fast" else "flash_attention_2" if flash else "sdpa",
    )


def _rows(setting: Setting, folder: str, kind: str) -> Dataset:
    """Return the `groups` or `pairs` of all steps, and no more: references are computed for every one."""
    return load_from_disk(f"{folder}/{kind}").select(range(setting.rows * setting.all_steps))


def _lora(setting: Setting) -> Any:
    if not setting.lora:
        return None
    from peft import LoraConfig

    return LoraConfig(r=16, lora_alpha=32, lora_dropout=0.0, target_modules="all-linear", task_type="CAUSAL_LM")


def _tokenizer() -> PreTrainedTokenizerFast:
    """Return a tokenizer that can pad and nothing else: trainers want one, though rows are ids already."""
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel({"<eos>": 0}, unk_token="<eos>")),
        eos_token="<eos>",
        pad_token="<eos>",
    )


def _arguments(setting: Setting, output: str) -> dict[str, Any]:
    cuda = torch.cuda.is_available()
    return {
        "output_dir": output,
        "max_length": setting.max_length,
        "max_steps": setting.all_steps,
        "per_device_train_batch_size": setting.micro_batch,
        "gradient_accumulation_steps": setting.accumulation,
        "gradient_checkpointing": setting.checkpointing,
        "torch_compile": setting.compiled,
        "train_sampling_strategy": "sequential",
        "beta": BETA,
        "learning_rate": setting.learning_rate,
        "max_grad_norm": MAX_GRAD_NORM,
        "router_aux_loss_coef": 0.0,  # the plain loop has none
        "seed": SEED,
        "optim": "adamw_torch_fused",
        "logging_steps": 1,
        "report_to": [],
        "save_strategy": "no",
        "disable_tqdm": True,
        "bf16": setting.precision == "bf16",
        "use_cpu": not cuda,
        "dataloader_pin_memory": cuda,
        "precompute_ref_log_probs": True,
    }


def _dpo_fast(setting: Setting, folder: str, output: str) -> TrainingLoop:
    from dpo_fast import DPOConfig, DPOTrainer

    trainer = DPOTrainer(
        _model(setting),
        args=DPOConfig(
            **_arguments(setting, output),
            max_tokens_per_micro_batch=setting.max_tokens,
            **({"layer_kernels": setting.layer_kernels} if setting.layer_kernels else {}),
            layout="shared",  # else a model that cannot share prompts would be timed in padded rows
            reference_cache_dir=f"{folder}/dpo_fast",
        ),
        train_dataset=_rows(setting, folder, "groups"),
        processing_class=_tokenizer(),
        peft_config=_lora(setting),
    )
    return loop_of(trainer, packed_positions)


def _trl(
    setting: Setting,
    folder: str,
    output: str,
    positions: Callable[[Any], int] = padded_positions,
) -> TrainingLoop:
    import trl

    # All weights go through SHA-256 for the name of a cache, which is this run's alone: a minute for 8 B.
    trl.trainer.dpo_trainer.hash_module = lambda model: "the same in all runs"
    trainer = trl_trainer_of_tokens()(
        _model(setting),
        args=trl.DPOConfig(**_arguments(setting, output)),
        train_dataset=_rows(setting, folder, "pairs"),
        processing_class=_tokenizer(),
        peft_config=_lora(setting),
    )
    return loop_of(trainer, positions)


def _patch_trl(setting: Setting, folder: str, output: str) -> TrainingLoop:
    os.environ["DPO_FAST_CACHE"] = f"{folder}/patch_trl"  # where the patched trainer keeps its references
    from dpo_fast import patch_trl
    from dpo_fast.integrations.trl.batches import PACKED

    patch_trl()
    return _trl(setting, folder, output, lambda batch: batch[PACKED].input_ids.numel())


class SequenceLogProbs(nn.Module):
    """Maps padded rows to the log-prob of each row's completion."""

    def __init__(self, causal_lm: nn.Module):
        super().__init__()
        self.causal_lm = causal_lm

    def forward(
        self,
        input_ids: Tensor,  # [2B, L]
        scored: Tensor,  # bool [2B, L], tokens of completions
    ) -> Tensor:  # [2B]
        logits = self.causal_lm(input_ids=input_ids, use_cache=False).logits[:, :-1]
        logps = logits.float().log_softmax(-1).gather(-1, input_ids[:, 1:, None])[..., 0]
        return (logps * scored[:, 1:]).sum(-1)


def padded_pairs(rows: Sequence[Mapping[str, Any]]) -> tuple[Tensor, Tensor]:
    """Return pairs as rows `[chosen …, rejected …]` of equal length: their ids, and which tokens are scored."""
    ids, scored = [], []
    for side in ("chosen_ids", "rejected_ids"):
        for row in rows:
            ids.append(torch.tensor([*row["prompt_ids"], *row[side]]))
            scored.append(torch.arange(len(ids[-1])) >= max(1, len(row["prompt_ids"])))
    return pad_sequence(ids, batch_first=True), pad_sequence(scored, batch_first=True)


def _plain(setting: Setting, folder: str, output: str) -> TrainingLoop:
    device = _device()
    pairs = _rows(setting, folder, "pairs").to_list()
    micro_batches = [pairs[start : start + setting.micro_batch] for start in range(0, len(pairs), setting.micro_batch)]
    causal_lm = _model(setting).to(device)
    set_seed(SEED)
    if setting.checkpointing:
        causal_lm.gradient_checkpointing_enable({"use_reentrant": False})
        causal_lm.enable_input_require_grads()
    if setting.lora:
        from peft import get_peft_model

        causal_lm = get_peft_model(causal_lm, _lora(setting))
    if setting.compiled:
        causal_lm.compile()
    model = SequenceLogProbs(causal_lm)
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=setting.precision == "bf16")
    with torch.no_grad(), autocast:  # an adapter that is new changes nothing yet
        references = [model(*(part.to(device) for part in padded_pairs(rows))) for rows in micro_batches]

    def train(gate: StepGate) -> Log:
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=setting.learning_rate, weight_decay=0.0, fused=True)
        schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, setting.all_steps)
        model.train()
        log = []
        gate.begin(model)
        for step in range(setting.all_steps):
            micro_batch = range(step * setting.accumulation, (step + 1) * setting.accumulation)
            batches = [
                tuple(part.to(device, non_blocking=True) for part in padded_pairs(micro_batches[index]))
                for index in micro_batch
            ]
            gate.step_begins()
            mean_loss = 0.0
            for batch, index in zip(batches, micro_batch, strict=True):
                gate.runs(batch[0].numel())
                with autocast:
                    logps = model(*batch)
                chosen, rejected = (logps - references[index]).chunk(2)
                loss = -nn.functional.logsigmoid(BETA * (chosen - rejected)).mean() / setting.accumulation
                loss.backward()
                mean_loss = mean_loss + loss.detach()
            gradient_norm = torch.nn.utils.clip_grad_norm_(trained, MAX_GRAD_NORM)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            gate.step_ends()
            log.append({"loss": mean_loss.item(), "grad_norm": gradient_norm.item()})
            gate.logged()
        return log

    return train


PROVIDERS: dict[str, Callable[[Setting, str, str], TrainingLoop]] = {
    "dpo_fast": _dpo_fast,
    "patch_trl": _patch_trl,
    "trl": _trl,
    "plain": _plain,
}
