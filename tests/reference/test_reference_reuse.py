"""What is computed again, and what is not: exactly the rows whose reference log-probs a change can change."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from datasets import Dataset, concatenate_datasets
from torch.nn.attention import _registry

from dpo_fast.reference.reference import attention_name
from dpo_fast.reference.store.maintenance import info
from dpo_fast_kernels import attention_backend
from families import tiny_model
from interpreting import environment
from preferences import make_trainer, pairs, trained

ROWS = pairs(12)


def computed(tmp_path, dataset: Dataset = ROWS, **options) -> int:
    return make_trainer(tmp_path, dataset, **options).reference.store.computed


@pytest.fixture
def filled(tmp_path):
    assert computed(tmp_path) == 24
    return tmp_path


@pytest.mark.parametrize(
    "change",
    [
        {"learning_rate": 0.5},
        {"output_dir": "elsewhere"},
        {"beta": 0.7},
        {"loss_type": "ipo"},
        {"seed": 7},
        {"per_device_train_batch_size": 2},
        {"max_length": 60},
        {"ld_alpha": 0.5},
        {"gradient_checkpointing": True},
    ],
    ids=str,
)
def test_what_does_not_change_the_numbers_costs_nothing(filled, change, monkeypatch):
    monkeypatch.chdir(filled)
    assert computed(filled, **change) == 0


def test_another_order_and_another_rank_cost_nothing(filled):
    peft = pytest.importorskip("peft")
    assert computed(filled, ROWS.shuffle(seed=1)) == 0
    for rank in (2, 8):
        assert computed(filled, peft_config=peft.LoraConfig(r=rank, target_modules=["q_proj"])) == 0


def test_new_rows_are_computed_and_no_others(tmp_path):
    some, more = pairs(300, seed=1), pairs(10, seed=2)
    assert computed(tmp_path, some) == 600
    assert computed(tmp_path, concatenate_datasets([some, more])) == 20


def test_a_shorter_max_length_computes_the_rows_that_it_cuts(filled):
    trainer = make_trainer(filled, ROWS)
    lengths = [len(row["prompt_ids"]) + len(ids) for row in trainer.train_dataset for ids in row["completion_ids"]]
    longest = max(lengths)
    assert computed(filled, max_length=longest) == 0
    assert computed(filled, max_length=longest - 1) == lengths.count(longest) > 0


def one_bit(model):
    weight = model.model.layers[0].mlp.up_proj.weight.data
    weight.view(torch.int32)[3, 2] ^= 1
    return model


def softcapped(model):
    model.config.final_logit_softcapping = 5.0
    return model


@pytest.mark.parametrize(
    "change",
    [
        {"model": lambda: one_bit(tiny_model("llama"))},
        {"model": lambda: softcapped(tiny_model("llama"))},
        {"model": lambda: tiny_model("llama").to(torch.bfloat16)},
        {"bf16": True},
        {"layout": "padded"},
    ],
    ids=["one bit of a weight", "softcap", "dtype of the weights", "mixed precision", "layout and its attention"],
)
def test_what_changes_the_numbers_computes_them_again(filled, change):
    options = {**change, **({"model": change["model"]()} if "model" in change else {})}
    assert computed(filled, **options) == 24
    assert computed(filled) == 0, "and the others are still there"
    assert len(info(filled / "reference")) == 2


def test_an_activated_flash_attention_is_part_of_the_attention(monkeypatch):
    """Stores of PyTorch's own FlashAttention-2 keep the name that they had."""
    cpu, cuda, model = torch.device("cpu"), torch.device("cuda"), tiny_model("llama")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    model.config._attn_implementation = "sdpa"

    def names(device):
        return [attention_name(layout, model, device, torch.bfloat16) for layout in ("shared", "padded")]

    on_cuda, on_cpu = [f"shared/{attention_backend(cuda)[0]}", "padded/sdpa"], ["shared/flash-cpu", "padded/sdpa"]
    assert names(cuda) == on_cuda and names(cpu) == on_cpu
    for implementation in ("FA3", "FA4"):
        monkeypatch.setattr(_registry, "_FLASH_ATTENTION_ACTIVE", (implementation, None))
        assert names(cuda) == [f"shared/varlen+{implementation}", f"padded/sdpa+{implementation}"]
        assert names(cpu) == on_cpu
    model.config._attn_implementation = "eager"
    assert names(cuda)[1] == "padded/eager"


def test_the_trained_policy_is_another_reference(filled):
    trainer = make_trainer(filled)
    trained(trainer)
    assert computed(filled, model=trainer.model) == 24


def test_a_held_out_set_after_training_is_found_in_the_store(filled):
    held_out = pairs(5, seed=6)
    make_trainer(filled, held_out)
    trainer = make_trainer(filled)
    trained(trainer)
    assert trainer.evaluate(held_out)["eval_loss"] > 0
    with pytest.raises(ValueError, match=r"lacks 4 of 4 .*\(the policy before training\) is not kept"):
        trainer.evaluate(pairs(2, seed=8))


def test_numbers_that_are_not_the_references_stop_the_run(filled, monkeypatch):
    """As if a kernel had changed since: the audit recomputes some rows."""
    from dpo_fast.reference.reference import Reference

    original = Reference.score
    monkeypatch.setattr(Reference, "score", lambda self, packed: original(self, packed) - 0.01)
    with pytest.raises(ValueError, match="reference_cache_dir: .* holds a reference log-prob of"):
        make_trainer(filled, ROWS)


def on_ranks(folder: str, rows: int) -> None:
    """Every process computes a share of `rows` completions, and all have all in the end."""
    trainer = make_trainer(Path(folder), pairs(40, seed=4))
    state = trainer.accelerator
    share = torch.tensor([trainer.reference.store.computed])
    counts = state.gather(share).tolist()
    assert sum(counts) == rows and min(counts) >= rows // 8, counts
    assert len(trainer.train_dataset["ref_logps"]) == 40
    print(f"rank {state.process_index} has its share")
    state.wait_for_everyone()
    torch.distributed.destroy_process_group()


def start(ranks: int, folder: Path, rows: int) -> None:
    program = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
    command = f"import test_reference_reuse; test_reference_reuse.on_ranks({str(folder)!r}, {rows})"
    run = subprocess.run(
        [*program, "--no-python", sys.executable, "-c", command],
        env=environment(),
        capture_output=True,
        text=True,
        timeout=180,
    )
    assert run.returncode == 0, run.stderr[-3000:]
    assert run.stdout.count("has its share") == ranks


@pytest.mark.slow
def test_two_ranks_share_the_pass_and_one_finds_it_done(tmp_path):
    start(2, tmp_path, rows=80)
    assert computed(tmp_path, pairs(40, seed=4)) == 0


@pytest.mark.slow  # four processes
def test_four_ranks_find_what_one_has_computed(tmp_path):
    assert computed(tmp_path, pairs(40, seed=4)) == 80
    start(4, tmp_path, rows=0)


def test_sums_that_the_rows_bring_do_not_do_for_ld_dpo(tmp_path):
    count = len(ROWS)
    rows = ROWS.add_column("ref_chosen_logps", [-9.0] * count).add_column("ref_rejected_logps", [-8.0] * count)
    trainer = make_trainer(tmp_path, rows)
    assert trainer.train_dataset["ref_logps"][:] == [[-9.0, -8.0]] * count, "they are taken as they are"
    with pytest.raises(ValueError, match="ref_chosen_logps: the train dataset has sums .* ld_alpha=0.5"):
        make_trainer(tmp_path, rows, ld_alpha=0.5)
