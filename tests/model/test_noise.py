"""NEFTune's noise has the size that a sequence's own length gives it, whatever it is batched with."""

from __future__ import annotations

import pytest
import torch

from dpo_fast.batches.groups import PreferenceGroup
from dpo_fast.batches.packing import pack
from dpo_fast.model.agreement import settle_forward
from dpo_fast.model.noise import noisy_embeddings
from families import tiny_model
from preferences import logged, make_trainer, pairs

ALPHA = 5.0


def noise_of(model, packed) -> torch.Tensor:  # [S, L, H]
    """What is added to the embeddings of a packed batch."""
    found = []
    embeddings = model.get_input_embeddings()
    with noisy_embeddings(model, ALPHA):
        handle = embeddings.register_forward_hook(lambda module, args, output: found.append((args[0], output)))
        model(packed=packed)
        handle.remove()
    ids, noisy = found[0]
    return noisy - embeddings.weight[ids]


@pytest.mark.parametrize("family", ["llama", "gpt2", "mamba"])
def test_the_noise_of_a_sequence_is_that_of_its_own_length(family):
    model = tiny_model(family)
    settle_forward(model, "padded")
    group = PreferenceGroup([5, 6, 7], [[8] * 60, [9, 10]])
    packed = pack([group], "padded")
    model.train()
    noise = noise_of(model, packed).detach()
    for row, length in zip(noise, (63, 5), strict=True):
        bound = ALPHA / (length * row.shape[-1]) ** 0.5
        assert row[:length].abs().max() <= bound * 1.001
        assert row[:length].abs().max() >= 0.9 * bound
        assert row[:length].std() == pytest.approx(bound / 3**0.5, rel=0.15)
    assert noise_of(model.eval(), packed).abs().max() == 0


def test_training_has_the_noise_and_the_reference_does_not(tmp_path, caplog):
    options = {"per_device_train_batch_size": 4, "eval_dataset": pairs(6, seed=3), "max_steps": 2}
    plain = make_trainer(tmp_path / "plain", pairs(4), layout="padded", **options)
    noisy = make_trainer(tmp_path / "noisy", pairs(4), neftune_noise_alpha=ALPHA, **options)
    assert noisy.layout == "padded" and "neftune_noise_alpha=5.0" in caplog.text
    assert list(noisy.train_dataset["ref_logps"]) == list(plain.train_dataset["ref_logps"])
    plain.train()
    noisy.train()
    assert logged(noisy, "loss")[0] != pytest.approx(logged(plain, "loss")[0], abs=1e-4)
    assert noisy.model.get_input_embeddings()._forward_hooks == {}, "none is left"


def test_a_shared_prompt_is_refused(tmp_path):
    with pytest.raises(ValueError, match="layout='shared' does not work, because neftune_noise_alpha=5.0"):
        make_trainer(tmp_path, layout="shared", neftune_noise_alpha=ALPHA)


def test_a_loss_that_runs_a_step_twice_is_refused(tmp_path):
    with pytest.raises(ValueError, match="neftune_noise_alpha=5.0 does not go with .*aot"):
        make_trainer(tmp_path, loss_type=["aot"], neftune_noise_alpha=ALPHA)
