"""What users wrote and stored yesterday works today: names, flags, environment variables, formats on disk.

A line may be added here. A line that goes breaks somebody's program, configuration or store.
"""

from __future__ import annotations

import dataclasses
import importlib
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from transformers import TrainerState

from dpo_fast import DPOCollator, PreferenceGroup, pack
from dpo_fast.machine import cache_dir
from dpo_fast.reference.fingerprint import STORE_VERSION, digest_of, weights_fingerprint
from dpo_fast.reference.store.index import INDEX_VERSION
from dpo_fast.reference.store.keys import completion_key, key_array
from dpo_fast.reference.store.parts import SCHEMA
from dpo_fast.reference.store.store import ReferenceStore
from dpo_fast.training.running_margin import RunningMargin
from repository import ROOT

NAMES = {
    "dpo_fast": """
        LOSSES Comparisons DPOCollator DPOConfig DPOTrainer FusedLinearDPOLoss InputError LossParameters Objective
        PackedBatch PackedOutput PreferenceGroup Reference SequenceLoss TrainingDiverged __version__ add_dpo_forward
        disable_dropout dpo_loss implicit_rewards load_preference_dataset pack patch_trl preference_loss
        prepare_dataset unpatch_trl use_shared_prefix
    """,
    "dpo_fast_kernels": """
        GatherPlan LogitTransform PreferenceLoss PrefixLayout RowLogps ScoreLayout SequenceLoss VocabularyShards
        attention_backend gather_rows linear_logps linear_preference_loss logps_of_logits prefix_attention
        sequence_logps
    """,
    "dpo_fast.integrations.trl": "DPOTrainer TESTED_VERSIONS check_trl_version patch_trl unpatch_trl",
    "dpo_fast.losses": """
        COUPLED Comparisons FDivergence LOSSES Loss LossParameters REFERENCE_FREE SMOOTHED SORTED WITH_LENGTHS
        WITH_OFFSETS aot aot_unpaired apo_down apo_zero bco_pair beta_dpo cpo discopop dpo_loss exo_pair heeds hinge ipo
        named_loss nca_pair nll orpo plackett_luce preference_loss robust score sft sigmoid sigmoid_norm simpo sppo_hard
    """,
    "dpo_fast.cli": "main",
}

# Flags of `dpo-fast train` beside those of transformers.TrainingArguments, which DPOConfig takes by that name too.
TRAIN_FLAGS = """
    activation_offloading allow_missing_weights attn_implementation beta beta_dpo_alpha bnb_4bit_quant_storage
    bnb_4bit_quant_type columns comparisons config couple dataset dataset_config dataset_name dataset_num_proc
    dataset_streaming dataset_test_split dataset_train_split datasets disable_dropout discopop_tau dtype
    f_alpha_divergence_coef f_divergence_type group_by_prompt ignore_bias_buffers label_smoothing layer_kernels
    layout ld_alpha load_in_4bit load_in_8bit log_completion_statistics lora_alpha lora_dropout lora_modules_to_save
    lora_r lora_target_modules lora_target_parameters lora_task_type loss_type loss_weights max_length
    max_tokens_per_micro_batch model model_init_kwargs model_name_or_path model_revision no_disable_dropout
    no_gradient_checkpointing no_log_completion_statistics pad_to_multiple_of pad_token padding_free
    precompute_ref_batch_size precompute_ref_log_probs ref_model_mixup_alpha ref_model_sync_steps reference_cache_dir
    resume_changed router_aux_loss_coef rpo_alpha simpo_gamma streaming sync_ref_model test_split_size torch_dtype
    truncation_mode trust_remote_code use_bnb_nested_quant use_dora use_peft use_rslora use_weighting
"""
OTHER_FLAGS = {
    "cache": "num_shards shard info verify prune dry_run export store reference_cache_dir",
    "score": "ref_model split output",
    "bench.command": "max_steps out",
    "demo": "model output_dir output-dir seed",
    "doctor": "model",
}

VARIABLES = ("DPO_FAST_AUTOTUNE", "DPO_FAST_CACHE", "DPO_FAST_PATCH_TRL", "XDG_CACHE_HOME")

STORED = Path(__file__).parent / "compatibility" / "store"  # written by an earlier release, six rows
DESCRIPTION = {"weights": "abc", "dtype": "float32"}


@pytest.mark.parametrize("module", NAMES)
def test_names_can_be_imported(module):
    if "trl" in module:
        pytest.importorskip("trl")
    found = importlib.import_module(module)
    missing = [name for name in NAMES[module].split() if not hasattr(found, name)]
    assert not missing


def test_earlier_names_of_packing_mean_the_same():
    group = PreferenceGroup([1], [[2, 3], [4]], ref_token_logps=[[-1.0, -2.0], [-3.0]])
    now, earlier = pack([group], split_for_ld_dpo=True), pack([group], cut=True)
    assert earlier.pieces.equal(now.completion_pieces) and earlier.cuts.equal(now.full_pieces)
    assert earlier.scores.index.equal(now.score_rows.index)
    row = {field.name: getattr(group, field.name) for field in dataclasses.fields(group)}
    (packed,) = DPOCollator(cut=True)([row])["packs"]
    assert packed.full_pieces.equal(now.full_pieces)


def test_flags_are_understood():
    from dpo_fast.commands.arguments import _train_parser

    known = {flag.removeprefix("--") for flag in _train_parser()._option_string_actions}
    assert not set(TRAIN_FLAGS.split()) - known
    for command, flags in OTHER_FLAGS.items():
        parser = importlib.import_module(f"dpo_fast.commands.{command}").parser()
        assert not {f"--{flag}" for flag in flags.split()} - set(parser._option_string_actions), command


def test_environment_variables_are_read(monkeypatch):
    sources = "".join(path.read_text() for folder in ("dpo_fast", "kernels") for path in (ROOT / folder).rglob("*.py"))
    assert not [name for name in VARIABLES if f'"{name}"' not in sources]
    monkeypatch.setenv("DPO_FAST_CACHE", "/somewhere")
    assert cache_dir() == Path("/somewhere")


def test_a_store_that_was_written_before_is_found_and_served(tmp_path):
    shutil.copytree(STORED, tmp_path / "store")
    with ReferenceStore(tmp_path / "store", DESCRIPTION) as store:
        keys = key_array([completion_key([n, 7], [n + 1, 5]) for n in range(6)])
        found, sums = store.lookup(keys)[:2]
        assert Path(store.folder).name == next(STORED.iterdir()).name
        assert found.all() and np.array_equal(sums, [-sum(range(1, n + 2)) / 4 for n in range(6)])
        tokens = store.token_logps(keys)
        assert [list(row) for row in tokens] == [[-(i + 1) / 4 for i in range(n + 1)] for n in range(6)]
    assert SCHEMA.names == ["key", "num_tokens", "logp", "token_logps"] and (STORE_VERSION, INDEX_VERSION) == (3, 2)


def test_a_model_has_the_name_that_it_had():
    """The store of a model is found by the content of its weights."""
    model = nn.Sequential(nn.Linear(3, 5), nn.Linear(5, 2))
    with torch.no_grad():
        for number, parameter in enumerate(model.parameters()):
            parameter.copy_(torch.arange(parameter.numel()).reshape(parameter.shape) / 8 + number)
    assert weights_fingerprint(model, adapters=True) == "7b44177ec8259c677efa61f0fdea56a2"
    assert digest_of(DESCRIPTION) == "a1d497a90b2e0361eb0cb3e541b9f9e8"


def test_a_checkpoint_keeps_the_running_margin_where_it_was():
    state = TrainerState(stateful_callbacks={"RunningMargin": {"args": {}, "attributes": {"mean": 0.25}}})
    margin = RunningMargin(torch.device("cpu"))
    margin.load(state)
    assert margin.mean.item() == 0.25
    margin.save(state)
    assert state.stateful_callbacks["RunningMargin"]["attributes"] == {"mean": 0.25}


def test_the_own_options_of_a_configuration_stay():
    from transformers import TrainingArguments

    from dpo_fast import DPOConfig

    theirs = {field.name for field in dataclasses.fields(TrainingArguments)}
    own = {field.name for field in dataclasses.fields(DPOConfig)} - theirs
    assert own <= set(TRAIN_FLAGS.split()), "list a new option here"
