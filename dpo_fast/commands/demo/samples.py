"""Fresh completions of a model, and how far it has moved from its reference on them."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase, set_seed

from dpo_fast.batches.groups import PreferenceGroup
from dpo_fast.batches.packing import pack
from dpo_fast.model.forward import add_dpo_forward
from dpo_fast.reference.progress import show_pass

MAX_NEW_TOKENS = 32
TEMPERATURE = 0.8  # at 1 a model of this size writes little sense
TOP_P = 0.95
PROMPTS_AT_ONCE = 20


@dataclass(frozen=True)
class Samples:
    """Completions of prompts: texts, rewards and token ids, one entry a sample."""

    prompts: list[str]
    texts: list[str]
    rewards: list[float]
    groups: list[PreferenceGroup]

    @property
    def mean_reward(self) -> float:
        return sum(self.rewards) / len(self.rewards)


@torch.no_grad()
def draw_samples(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    *,
    per_prompt: int,
    seed: int,
    name: str,
) -> Samples:
    """Draws `per_prompt` completions of at most 32 tokens a prompt, the same random numbers for every model."""
    set_seed(seed)
    model.eval()
    tokenizer.padding_side = "left"
    repeated, texts, groups = [], [], []
    with show_pass(f"Samples {name}", len(prompts), "prompts") as are_done:
        for start in range(0, len(prompts), PROMPTS_AT_ONCE):
            part = list(prompts[start : start + PROMPTS_AT_ONCE])
            inputs = tokenizer(part, return_tensors="pt", padding=True).to(model.device)
            ids = model.generate(
                **inputs,
                max_new_tokens=MAX_NEW_TOKENS,
                do_sample=True,
                temperature=TEMPERATURE,
                top_k=0,
                top_p=TOP_P,
                num_return_sequences=per_prompt,
                pad_token_id=tokenizer.pad_token_id,
            )[:, inputs["input_ids"].shape[1] :].cpu()
            for index, row in enumerate(ids):
                prompt = part[index // per_prompt]
                completion = _until_end(row.tolist(), tokenizer.eos_token_id)
                repeated.append(prompt)
                texts.append(tokenizer.decode(completion, skip_special_tokens=True))
                groups.append(PreferenceGroup(tokenizer(prompt)["input_ids"], [completion], (), ()))
            are_done(len(part))
    return Samples(repeated, texts, sentiment(texts), groups)


def _until_end(ids: list[int], end: int) -> list[int]:
    return ids[: ids.index(end) + 1] if end in ids else ids


@torch.no_grad()
def sequence_kl(model: PreTrainedModel, reference: PreTrainedModel, samples: Samples) -> float:
    """KL(model ‖ reference) per sequence, in nats: the mean of ℓ − ℓ_ref over samples of the model."""
    logps = []
    for policy in (model, reference):
        add_dpo_forward(policy)
        policy.eval()
        packs = [
            pack(samples.groups[i : i + 32], "padded").to(policy.device) for i in range(0, len(samples.groups), 32)
        ]
        logps.append(torch.cat([policy(packed=packed).logps.cpu() for packed in packs]))
    return (logps[0] - logps[1]).mean().item()


def sentiment(texts: list[str]) -> list[float]:
    """VADER's compound score of each text, in [−1, 1]: negative … neutral (0) … positive.

    Raises:
        ImportError: the packages of `pip install "dpo-fast[demo]"` are missing.
    """
    analyzer = _analyzer()
    return [analyzer.polarity_scores(text)["compound"] for text in texts]


@functools.cache
def _analyzer() -> Any:
    try:
        from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer
    except ImportError as error:
        raise ImportError(
            'The demo\'s reward needs the package "vaderSentiment": run  pip install "dpo-fast[demo]"'
        ) from error
    return SentimentIntensityAnalyzer()
