"""Frequencies that depend on a sequence's length: a completion has those that it has alone, in any company."""

from __future__ import annotations

import math

import pytest
import torch

from dpo_fast.batches.groups import PreferenceGroup
from dpo_fast.batches.packing import pack
from dpo_fast.model.agreement import settle_forward
from families import tiny_model
from preferences import logged, make_trainer, pairs, words

LIMIT = 24
KINDS = {
    "dynamic": {
        "max_position_embeddings": LIMIT,
        "rope_parameters": {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 100.0},
    },
    "longrope": {
        "max_position_embeddings": 256,
        "rope_parameters": {
            "rope_type": "longrope",
            "rope_theta": 100.0,
            "factor": 4.0,
            "original_max_position_embeddings": LIMIT,
            "short_factor": [1.0, 1.0, 1.0, 1.0],
            "long_factor": [1.0, 2.0, 3.0, 4.0],
        },
    },
}


def model_of(kind: str, family: str = "llama"):
    own = {"original_max_position_embeddings": LIMIT} if family == "phi3" else {}
    return tiny_model(family, num_hidden_layers=2, **KINDS[kind], **own)


def group(prompt: int, *completions: int, seed: int = 0) -> PreferenceGroup:
    generator = torch.Generator().manual_seed(seed)
    ids = [torch.randint(3, 97, (n,), generator=generator).tolist() for n in (prompt, *completions)]
    return PreferenceGroup(ids[0], ids[1:])


def alone(kind: str, family: str, row: PreferenceGroup) -> torch.Tensor:
    """Log-probs of the completions, each by a model that has seen nothing before."""
    found = []
    for completion in row.completion_ids:
        ids = torch.tensor([[*row.prompt_ids, *completion]])
        logits = model_of(kind, family)(input_ids=ids, use_cache=False).logits[0, len(row.prompt_ids) - 1 : -1]
        found.append(logits.log_softmax(-1).gather(1, torch.tensor(completion)[:, None])[:, 0])
    return torch.cat(found).detach()


@pytest.mark.parametrize(
    ("kind", "family"),
    [("dynamic", "llama"), ("dynamic", "qwen3"), ("longrope", "llama"), ("longrope", "phi3"), ("longrope", "qwen3")],
)
def test_a_completion_has_the_log_probs_that_it_has_alone(kind, family):
    model = model_of(kind, family)
    assert settle_forward(model, "auto", max_length=100) == "padded"
    rows = [group(10, 4, 40), group(30, 3, 9, seed=1), group(5, 6, 70, seed=2)]
    truth = torch.cat([alone(kind, family, row) for row in rows])
    together = model(packed=pack(rows, "padded")).token_logps
    assert torch.allclose(together, truth, atol=1e-4)
    again = torch.cat([model(packed=pack([row], "padded")).token_logps for row in reversed(rows)])
    expected = torch.cat([alone(kind, family, row) for row in reversed(rows)])
    assert torch.allclose(again, expected, atol=1e-4), "whatever ran before"


@pytest.mark.parametrize("kind", KINDS)
def test_up_to_the_limit_prompts_are_shared_and_beyond_it_a_pack_is_refused(kind):
    model = model_of(kind)
    assert settle_forward(model, "auto", max_length=LIMIT) == "shared"
    short = group(8, 5, 16)
    assert torch.allclose(model(packed=pack([short])).token_logps, alone(kind, "llama", short), atol=1e-4)
    with pytest.raises(ValueError, match=f"sequence of 25 tokens.*beyond {LIMIT}.*layout='padded'"):
        model(packed=pack([group(8, 5, 17)]))
    with pytest.raises(ValueError, match=f"layout='shared' does not work.*beyond {LIMIT} tokens"):
        settle_forward(model_of(kind), "shared", max_length=LIMIT + 1)


@pytest.mark.parametrize("kind", KINDS)
def test_training_begins_at_ln_2_and_margins_stay_without_steps(tmp_path, kind):
    generator = torch.Generator().manual_seed(0)
    rows = pairs(6).map(lambda row: {"chosen": " " + words(30, generator)})
    trainer = make_trainer(tmp_path, rows, model=model_of(kind), per_device_train_batch_size=3, learning_rate=0.0)
    trainer.train()
    assert trainer.layout == "padded"
    assert logged(trainer, "loss") == pytest.approx([math.log(2)] * 3, abs=1e-5)
    assert logged(trainer, "rewards/margins") == pytest.approx([0.0] * 3, abs=1e-4)
