"""Whatever the model: packed log-probs and gradients are the model's own, or the model is refused.

The truth is computed here, from `model(input_ids=one sequence).logits`, not by the comparison that is under test.
"""

from __future__ import annotations

import math

import pytest
import torch

from causal_lms import BUILDABLE, causal_lm
from dpo_fast.batches.groups import PreferenceGroup
from dpo_fast.batches.packing import pack
from dpo_fast.model.agreement import settle_forward
from dpo_fast.model.dropout import disable_dropout

# They look at later tokens, are random without a rate that could be set, or treat a row by its length.
REFUSED = {"big_bird", "cpmant", "doge", "prophetnet", "reformer", "xlm", "xlnet"}


def groups(generator: torch.Generator) -> list[PreferenceGroup]:
    """Sequences longer than every window and chunk of the shrunk models; a prompt and a completion of one token."""
    shapes = [(15, (12, 20)), (1, (1, 9, 30)), (31, (7, 3))]
    ids = [torch.randint(3, 97, (prompt + sum(rest),), generator=generator) for prompt, rest in shapes]
    parts = [row.split([prompt, *rest]) for row, (prompt, rest) in zip(ids, shapes, strict=True)]
    return [PreferenceGroup(prompt.tolist(), [part.tolist() for part in rest]) for prompt, *rest in parts]


def own_logps(model, rows: list[PreferenceGroup]) -> torch.Tensor:
    found = []
    if getattr(model.config.get_text_config(), "index_topk", None):  # rounding turns its choice of keys around
        packed = pack(rows, "padded")
        logits = model(input_ids=packed.input_ids, attention_mask=packed.attention_mask, use_cache=False).logits
        logits = logits.flatten(0, 1)[packed.score_rows.index]
        return logits.log_softmax(-1).gather(1, packed.targets[:, None])[:, 0]
    for row in rows:
        for completion in row.completion_ids:
            ids = torch.tensor([[*row.prompt_ids, *completion]])
            logits = model(input_ids=ids, use_cache=False).logits[0, len(row.prompt_ids) - 1 : -1].float()
            found.append(logits.log_softmax(-1).gather(1, torch.tensor(completion)[:, None])[:, 0])
    return torch.cat(found)


def gradients(model, logps: torch.Tensor) -> dict[str, torch.Tensor]:
    model.zero_grad()
    (logps * torch.linspace(-1, 1, len(logps))).sum().backward()
    return {name: weight.grad.clone() for name, weight in model.named_parameters() if weight.grad is not None}


def assert_same(model, layout: str, rows: list[PreferenceGroup]) -> None:
    """Log-probs within 1e-4 nat, and gradients of all weights within 1e-3, of the model's own."""
    before = model.config._attn_implementation
    if model._can_set_attn_implementation():
        model.set_attn_implementation("eager")  # SDPA leaves softcaps out
    truth = own_logps(model, rows)
    true_gradients = gradients(model, truth)
    if model._can_set_attn_implementation():
        model.set_attn_implementation(before)
    found = model(packed=pack(rows, layout)).token_logps
    assert (found - truth).abs().max() <= 1e-4
    found_gradients = gradients(model, found)
    whole = math.sqrt(sum(gradient.square().sum() for gradient in true_gradients.values()))
    for name, gradient in true_gradients.items():
        error = (found_gradients.get(name, torch.zeros_like(gradient)) - gradient).norm()
        assert error <= 1e-3 * (gradient.norm() + 1e-3 * whole), name


@pytest.mark.parametrize("kind", BUILDABLE)
def test_every_causal_language_model(kind):
    model = causal_lm(kind)
    disable_dropout(model)
    model.train()
    try:
        layout = settle_forward(model, "auto", training=True)
    except ValueError as error:
        assert kind in REFUSED, error
        return
    assert kind not in REFUSED
    rows = groups(torch.Generator().manual_seed(3))
    assert_same(model, layout, rows)
