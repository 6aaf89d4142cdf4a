"""Resuming compares: what alters the result is refused by name with old and new values, or accepted by name."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path

import pytest
import torch
import transformers
from datasets import Dataset
from packaging import version
from torch.optim import AdamW

from dpo_fast.config import DPOConfig
from dpo_fast.data.columns import COLUMNS
from dpo_fast.training.resuming import RECORD_FILE
from dpo_fast.training.run_record import ALTERING, HARMLESS, OWN, RESTORED, changes, origin_of, record_of
from families import tiny_model
from preferences import logged, make_trainer, pairs, trained

SAVED = {"save_strategy": "steps", "save_steps": 1, "max_steps": 3}
STEP = 2


def other_base():
    return tiny_model("llama", seed=5)


def in_bf16():
    return tiny_model("llama").to(torch.bfloat16)


def reversed_rows() -> Dataset:
    rows = pairs()
    return rows.select(range(len(rows) - 1, -1, -1))


def another_row() -> Dataset:
    rows = pairs().to_list()
    rows[7]["rejected"] += " w4"
    return Dataset.from_list(rows)


# What changes → the words of the refusal.
CHANGES = {
    "beta": ({"beta": 0.2}, "beta: 0.1 → 0.2"),
    "loss_type": ({"loss_type": ["ipo"]}, 'loss_type: ["sigmoid"] → ["ipo"]'),
    "per_device_train_batch_size": ({"per_device_train_batch_size": 2}, "per_device_train_batch_size: 4 → 2"),
    "gradient_accumulation_steps": ({"gradient_accumulation_steps": 2}, "gradient_accumulation_steps: 1 → 2"),
    "seed": ({"seed": 7}, "seed: 42 → 7"),
    "bf16": ({"bf16": True}, "bf16: False → True"),
    "optim": ({"optim": "sgd"}, "optim: 'adamw_torch"),
    "learning_rate": ({"learning_rate": 2e-3}, "learning_rate: 0.001 → 0.002"),
    "lr_scheduler_type": ({"lr_scheduler_type": "cosine"}, "lr_scheduler_type: 'linear' → 'cosine'"),
    "max_steps": ({"max_steps": 4}, "max_steps: 3 → 4"),
    "max_length": ({"max_length": 16}, "max_length: 64 → 16"),
    "neftune_noise_alpha": ({"neftune_noise_alpha": 5.0}, "neftune_noise_alpha: None → 5.0"),
    "layout": ({"layout": "padded"}, "layout: 'shared' → 'padded'"),
    "data": ({"dataset": another_row}, 'data: {"hash": "'),
    "data in another order": ({"dataset": reversed_rows}, 'data: {"hash": "'),
    "data of another length": ({"dataset": lambda: pairs(12)}, 'data: {"groups": 16, "hash": "'),
    "weights": ({"model": other_base}, 'weights: {"reference": "'),
    "dtype": ({"model": in_bf16}, "dtype: 'float32' → 'bfloat16'"),
}  # fmt: skip
# What changes with it.
FOLLOWS = {"max_length": ["data"], "neftune_noise_alpha": ["layout"]}


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    """A folder with the checkpoints of a run."""
    folder = tmp_path_factory.mktemp("saved")
    make_trainer(folder, **SAVED).train()
    return folder


def checkpoint(folder: Path) -> str:
    return str(folder / "out" / f"checkpoint-{STEP}")


def trainer_of(folder: Path, **options):
    options = {name: value() if callable(value) else value for name, value in options.items()}
    return make_trainer(folder, **{**SAVED, "save_strategy": "no", **options})


def weights_in(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.rglob("*.safetensors")}


def test_every_option_is_known_to_alter_the_result_or_not():
    """A field that transformers, or we, add is thought of before it passes here."""
    names = {option.name for option in dataclasses.fields(DPOConfig)}
    assert not HARMLESS & ALTERING
    assert not names - HARMLESS - ALTERING, "does it alter the weights that come out?"
    if version.parse(transformers.__version__) >= version.parse("5.23"):  # earlier releases lack some
        assert not (HARMLESS | ALTERING) - names - {"logging_dir"}
    assert ALTERING | set(OWN) >= RESTORED


@pytest.mark.parametrize("changed", CHANGES)
def test_what_alters_the_result_is_refused_by_name_and_accepted_by_name(saved, tmp_path, caplog, changed):
    options, words = CHANGES[changed]
    name = changed.split()[0]
    trainer = trainer_of(tmp_path, **options)
    before = {key: weight.clone() for key, weight in trainer.model.state_dict().items()}
    with pytest.raises(ValueError, match=rf"differs: (.*; )?{re.escape(words)}") as refused:
        trainer.train(resume_from_checkpoint=checkpoint(saved))
    names = sorted([name, *FOLLOWS.get(name, [])])
    assert f"resume_changed={names}" in str(refused.value) and "\n" not in str(refused.value)
    assert all(torch.equal(weight, before[key]) for key, weight in trainer.model.state_dict().items())
    trainer.args.resume_changed = [name, *FOLLOWS.get(name, []), "tf32"]  # what has not changed may stand there
    assert trainer._checkpoint_for(checkpoint(saved)) == checkpoint(saved)
    assert caplog.text.count(f"resume_changed: {words}") == 1


# Options that are settled otherwise before they are compared: what settles them.
SETTLED = {
    "bf16": "the accelerator", "fp16": "the accelerator", "layout": "the model", "router_aux_loss_coef": "the model",
    "num_train_epochs": "max_steps", "accelerator_config": "an object", "optim": "a name",
}  # fmt: skip


def test_each_option_that_alters_the_result_is_compared_and_no_other(saved, tmp_path, monkeypatch):
    trainer = trainer_of(tmp_path)
    record = json.loads((Path(checkpoint(saved)) / RECORD_FILE).read_text())
    assert changes(record, record_of(trainer, trainer._origin)) == []
    origin = trainer._origin | {"optimizer": record["optimizer"]}
    for option in dataclasses.fields(DPOConfig):
        with monkeypatch.context() as patch:
            patch.setattr(trainer.args, option.name, {"another": "value"})
            if option.name in ("per_device_train_batch_size", "gradient_accumulation_steps", "max_steps"):
                patch.setattr(trainer.args, option.name, 7)
            if option.name in SETTLED:
                continue
            found = [change.name for change in changes(record, record_of(trainer, origin))]
        assert found == ([option.name] if option.name in ALTERING else []), option.name


def test_a_run_with_an_accepted_change_trains_to_its_end_and_may_be_resumed_itself(saved, tmp_path):
    """Its checkpoints say what it was from there on."""
    trainer = trainer_of(tmp_path, save_strategy="steps", beta=0.3, resume_changed=["beta"])
    trainer.train(resume_from_checkpoint=checkpoint(saved))
    assert trainer.state.global_step == 3
    trainer_of(tmp_path, beta=0.3)._checkpoint_for(True)
    with pytest.raises(ValueError, match="differs: beta: 0.3 → 0.1; set back"):
        trainer_of(tmp_path)._checkpoint_for(True)


def test_all_changes_are_named_at_once_and_one_name_accepts_one(saved, tmp_path):
    trainer = trainer_of(tmp_path, beta=0.3, seed=1, max_length=32, resume_changed=["seed"])
    with pytest.raises(ValueError, match="beta: 0.1 → 0.3; max_length: 64 → 32; set back"):
        trainer.train(resume_from_checkpoint=checkpoint(saved))


@pytest.mark.parametrize(
    ("name", "near"), [("betta", "beta"), ("learning-rate", "learning_rate"), ("wieghts", "weights")]
)
def test_an_unknown_name_gets_the_nearest(saved, tmp_path, name, near):
    with pytest.raises(ValueError, match=f"resume_changed has '{name}'.*did you mean {near}?"):
        trainer_of(tmp_path, resume_changed=[name])


HARMLESS_CHANGES = {
    "logging_steps": 2, "save_steps": 3, "save_strategy": "epoch", "save_total_limit": 1, "report_to": [],
    "eval_strategy": "steps", "eval_steps": 1, "dataloader_num_workers": 1, "dataloader_pin_memory": False,
    "gradient_checkpointing": True, "max_tokens_per_micro_batch": 40, "run_name": "again", "disable_tqdm": True,
    "log_completion_statistics": False, "num_train_epochs": 7.0,
}  # fmt: skip


def test_what_alters_nothing_passes_and_ends_with_the_same_weights(saved, tmp_path):
    """Other output folder, too. Bits may differ with the packs that max_tokens_per_micro_batch makes."""
    again = trainer_of(tmp_path, eval_dataset=pairs(4, seed=3), **HARMLESS_CHANGES)
    weights = trained(again, resume_from_checkpoint=checkpoint(saved))
    whole = trained(trainer_of(tmp_path / "whole"))
    assert all(torch.allclose(weights[name], whole[name], atol=1e-6) for name in whole)


def test_a_step_of_as_many_groups_may_be_cut_otherwise(saved, tmp_path):
    cut = trainer_of(tmp_path, per_device_train_batch_size=2, gradient_accumulation_steps=2)
    weights = trained(cut, resume_from_checkpoint=checkpoint(saved))
    whole = trained(trainer_of(tmp_path / "whole"))
    assert all(torch.allclose(weights[name], whole[name], atol=1e-6) for name in whole)


@pytest.mark.parametrize(
    ("options", "rate"),
    [
        ({"learning_rate": 2e-3}, 2e-3 / 3),
        ({"lr_scheduler_type": "constant", "max_steps": 3}, 1e-3),
        ({"max_steps": 4}, 5e-4),
    ],
)
def test_what_is_accepted_of_the_schedule_holds(saved, tmp_path, options, rate):
    """Not the rate that the checkpoint keeps. The third step of the linear schedule has (n − 2)/n of the rate."""
    names = ["learning_rate", "lr_scheduler_type", "max_steps"]
    trainer = trainer_of(tmp_path, **options, resume_changed=names)
    trainer.train(resume_from_checkpoint=checkpoint(saved))
    assert logged(trainer, "learning_rate")[STEP] == pytest.approx(rate)
    fresh = trainer_of(tmp_path / "fresh", **options)
    fresh.train()
    assert logged(fresh, "learning_rate")[STEP:] == pytest.approx(logged(trainer, "learning_rate")[STEP:])
    groups = [
        [{name: value for name, value in group.items() if name != "params"} for group in run.optimizer.param_groups]
        for run in (trainer, fresh)
    ]
    assert groups[0] == groups[1]


def test_settings_of_the_optimizer_that_are_accepted_hold_and_its_moments_stay(saved, tmp_path):
    trainer = trainer_of(tmp_path, adam_beta2=0.9, weight_decay=0.5, resume_changed=["adam_beta2", "weight_decay"])
    trainer.train(resume_from_checkpoint=checkpoint(saved))
    groups = trainer.optimizer.param_groups
    assert {tuple(group["betas"]) for group in groups} == {(0.9, 0.9)}
    assert [group["weight_decay"] for group in groups] == [0.5, 0.0]
    assert {int(state["step"]) for state in trainer.optimizer.state.values()} == {3}


def test_another_optimizer_begins_with_an_empty_state_and_the_schedule_goes_on(saved, tmp_path):
    trainer = trainer_of(tmp_path, optim="sgd", resume_changed=["optim"])
    trainer.train(resume_from_checkpoint=checkpoint(saved))
    assert all("exp_avg" not in state for state in trainer.optimizer.state.values())
    assert logged(trainer, "learning_rate")[STEP] == pytest.approx(1e-3 / 3)


def test_an_optimizer_of_ones_own_is_compared(tmp_path):
    def given(**settings):
        trainer = make_trainer(tmp_path, **SAVED)
        trainer.optimizer = AdamW(trainer.model.parameters(), **settings)
        return trainer

    given(lr=1e-3).train()
    assert given(lr=1e-3)._checkpoint_for(checkpoint(tmp_path))
    with pytest.raises(ValueError, match=r"optimizer: .*0.001.* → .*0.01"):
        given(lr=1e-2).train(resume_from_checkpoint=checkpoint(tmp_path))


def test_a_schedule_that_keeps_its_rate_in_the_checkpoint_cannot_take_another(tmp_path):
    options = {
        "lr_scheduler_type": "reduce_lr_on_plateau", "eval_strategy": "steps", "eval_steps": 1,
        "eval_dataset": pairs(4, seed=3),
    }  # fmt: skip
    make_trainer(tmp_path, **SAVED, **options).train()
    names = ["learning_rate", "eval_steps"]
    trainer = trainer_of(tmp_path, **options, learning_rate=0.1, resume_changed=names)
    with pytest.raises(ValueError, match=r"learning_rate: 0.001 → 0.1 \(cannot be accepted: the schedule"):
        trainer.train(resume_from_checkpoint=checkpoint(tmp_path))
    trainer = trainer_of(tmp_path, **{**options, "eval_steps": 3})
    with pytest.raises(ValueError, match="eval_steps: 1 → 3"):
        trainer.train(resume_from_checkpoint=checkpoint(tmp_path))


def test_adapters_are_compared_and_so_is_what_they_stand_on(tmp_path):
    from peft import LoraConfig

    def run(model=None, **adapter):
        config = LoraConfig(
            **{"r": 4, "lora_alpha": 8, "target_modules": ["q_proj"], "task_type": "CAUSAL_LM", **adapter}
        )
        return make_trainer(tmp_path, model=model, peft_config=config, loss_type=["simpo"], **SAVED)

    run().train()
    assert run()._checkpoint_for(checkpoint(tmp_path))
    for trainer, words in (
        (run(r=8), r'of shape.*what has changed: adapter: {"default": {"r": 4}} → {"default": {"r": 8}}'),
        (run(lora_alpha=16), r'adapter: {"default": {"lora_alpha": 8}} → {"default": {"lora_alpha": 16}}; set'),
        (run(model=other_base()), r'weights: {"frozen": ".* → {"frozen": "'),
    ):
        with pytest.raises(ValueError, match=words):
            trainer.train(resume_from_checkpoint=checkpoint(tmp_path))


def test_the_hash_of_rows_is_of_what_they_say_not_of_where_they_lie(saved, tmp_path):
    record = json.loads((Path(checkpoint(saved)) / RECORD_FILE).read_text())
    rows = pairs()
    mixed = rows.select([*range(8, 16), *range(8)]).select([*range(8, 16), *range(8)])
    trainer = trainer_of(tmp_path, dataset=lambda: mixed)
    assert changes(record, record_of(trainer, trainer._origin)) == []
    groups = trainer.train_dataset.remove_columns("ref_logps")
    for column in set(COLUMNS) & set(groups.column_names):
        values = groups[column][:]
        values[3] = json.loads(re.sub(r"\d+", lambda n: str(int(n[0]) + 1), json.dumps(values[3]), count=1))
        trainer.train_dataset = groups.remove_columns(column).add_column(
            column, values, feature=groups.features[column]
        )
        assert [change.name for change in changes(record, record_of(trainer, origin_of(trainer)))] == ["data"], column


def test_changes_are_refused_before_the_reference_pass_where_the_arguments_say_what_to_resume(saved, tmp_path):
    options = {"resume_from_checkpoint": checkpoint(saved), "dataset": another_row, "beta": 0.3}
    with pytest.raises(ValueError, match="beta: 0.1 → 0.3; data: .*; set back"):
        trainer_of(tmp_path, **options)
    assert not (tmp_path / "reference").exists()
    trainer_of(tmp_path, **options, resume_changed=["beta", "data"])


def test_log_probs_that_the_rows_bring_are_compared(tmp_path):
    def run(change: float = 0.0):
        rows = pairs()
        for name, value in (("ref_chosen_logps", -20.0), ("ref_rejected_logps", -30.0 - change)):
            rows = rows.add_column(name, [value] * len(rows))
        return make_trainer(tmp_path, rows, eval_dataset=pairs(4, seed=3), **SAVED)

    run().train()
    assert run()._checkpoint_for(checkpoint(tmp_path))
    with pytest.raises(ValueError, match="data: "):
        run(change=0.5)._checkpoint_for(checkpoint(tmp_path))


def test_records_hold_no_secrets_and_only_plain_values(saved):
    text = (Path(checkpoint(saved)) / RECORD_FILE).read_text()
    record = json.loads(text)
    assert record.keys() == {option.name for option in dataclasses.fields(DPOConfig)} - HARMLESS | set(OWN)
    assert "hub_token" not in text and " object at 0x" not in text


def test_an_older_checkpoint_is_resumed_with_one_warning(tmp_path, caplog):
    make_trainer(tmp_path, **SAVED).train()
    for file in Path(checkpoint(tmp_path)).glob("dpo_fast_*.json"):
        file.unlink()
    trainer = trainer_of(tmp_path, beta=0.3)
    trainer.train(resume_from_checkpoint=checkpoint(tmp_path))
    assert caplog.text.count("nothing could be compared") == 1 and trainer.state.global_step == 3
    with pytest.raises(ValueError, match="the state of another optimizer than SGD in optimizer.pt"):
        trainer_of(tmp_path, optim="sgd").train(resume_from_checkpoint=checkpoint(tmp_path))
