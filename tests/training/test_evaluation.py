"""Every evaluation reports under its own names, and nothing of one shows in the next."""

from __future__ import annotations

import dataclasses
import math
import re

import numpy as np
import pytest
from datasets import Dataset
from transformers import TrainingArguments

from dpo_fast import DPOTrainer
from dpo_fast.errors import InputError
from families import tiny_model
from preferences import logged, make_trainer, pairs, ranked

NAMES = ("rewards/accuracies", "rewards/margins", "rewards/chosen", "logps/chosen", "entropy", "mean_token_accuracy")


def far(count: int, seed: int) -> Dataset:
    """Rows whose rejected completions are chosen ones elsewhere: another accuracy than that of `pairs`."""
    rows = pairs(count, seed=seed)
    return Dataset.from_dict({"prompt": rows["prompt"], "chosen": rows["rejected"], "rejected": rows["chosen"]})


def test_several_sets_have_their_own_names(tmp_path):
    one, two = pairs(6, seed=1), far(6, seed=1)
    both = make_trainer(tmp_path, eval_dataset={"one": one, "two": two}, max_steps=6)
    both.train()
    metrics = both.evaluate()
    for name in NAMES:
        assert f"eval_one_{name}" in metrics and f"eval_two_{name}" in metrics and f"eval_{name}" not in metrics
    assert metrics["eval_one_rewards/margins"] == pytest.approx(-metrics["eval_two_rewards/margins"], rel=1e-4)
    assert metrics["eval_one_loss"] != metrics["eval_two_loss"]
    for name in ("rewards/margins", "loss"):
        assert logged(both, f"eval_two_{name}") == [metrics[f"eval_two_{name}"]]


def test_a_prefix_is_honoured(tmp_path):
    trainer = make_trainer(tmp_path, eval_dataset=pairs(6, seed=1))
    plain, named = trainer.evaluate(), trainer.evaluate(metric_key_prefix="held_out")
    assert {name.removeprefix("held_out_") for name in named if name.startswith("held_out_")} >= {"loss", *NAMES}
    assert not [name for name in named if name.startswith("eval_")]
    for name in ("loss", *NAMES):
        assert named[f"held_out_{name}"] == plain[f"eval_{name}"]


def test_the_best_model_is_chosen_by_a_set_of_several(tmp_path):
    trainer = make_trainer(
        tmp_path,
        eval_dataset={"one": pairs(6, seed=1), "two": far(6, seed=1)},
        max_steps=4,
        eval_strategy="steps",
        eval_steps=2,
        save_strategy="steps",
        save_steps=2,
        load_best_model_at_end=True,
        metric_for_best_model="eval_two_rewards/margins",
        greater_is_better=True,
    )
    trainer.train()
    margins = logged(trainer, "eval_two_rewards/margins")
    assert len(margins) == 2 and trainer.state.best_metric == max(margins)


@pytest.mark.parametrize("dataset", [pairs, ranked])
def test_predictions_of_raw_rows_are_rewards(tmp_path, dataset):
    trainer = make_trainer(tmp_path, dataset(8), eval_dataset=dataset(5, seed=3), max_steps=3)
    before = trainer.predict(dataset(5, seed=3))
    assert not before.predictions.any(), "an untrained policy has no reward"
    held_out = trainer.evaluate()
    trainer.train()
    output = trainer.predict(dataset(5, seed=3))
    margins = output.predictions[:, 0] - output.predictions[:, 1]
    weighted = (margins * output.label_ids).sum() / output.label_ids.sum()
    assert output.predictions.shape == (len(output.label_ids), 2)
    assert math.isfinite(output.metrics["test_loss"]) and weighted != 0
    # A metric is a mean over batches; here there is one.
    assert output.metrics["test_rewards/margins"] == pytest.approx(weighted, rel=1e-4)
    assert not [name for name in output.metrics if name.startswith("eval_")]
    again = trainer.evaluate()
    assert again["eval_rewards/margins"] == pytest.approx(weighted, rel=1e-4) and held_out["eval_rewards/margins"] == 0


def test_nothing_of_a_broken_evaluation_shows_in_the_next(tmp_path, monkeypatch):
    trainer = make_trainer(tmp_path, eval_dataset=pairs(12, seed=1), per_device_eval_batch_size=4)
    expected = trainer.evaluate()
    original, calls = type(trainer).prediction_step, []

    def broken(self, *args, **kwargs):
        calls.append(args)
        if len(calls) == 2:
            raise RuntimeError("out of luck")
        return original(self, *args, **kwargs)

    monkeypatch.setattr(type(trainer), "prediction_step", broken)
    with pytest.raises(RuntimeError, match="out of luck"):
        trainer.evaluate(pairs(12, seed=9))
    monkeypatch.undo()
    found = trainer.evaluate()
    assert {name: found[f"eval_{name}"] for name in NAMES} == {name: expected[f"eval_{name}"] for name in NAMES}


STEPS = {"eval_strategy": "steps", "eval_steps": 1}
BEST = {**STEPS, "save_strategy": "steps", "save_steps": 1, "load_best_model_at_end": True}
WORKING = {
    "include_for_metrics": {"include_for_metrics": ["loss"]},
    "batch_eval_metrics": {"batch_eval_metrics": True, "include_for_metrics": ["loss"]},
    "eval_do_concat_batches": {"eval_do_concat_batches": False, "include_for_metrics": ["loss"]},
    "eval_accumulation_steps": {"eval_accumulation_steps": 1},
    "eval_use_gather_object": {"eval_use_gather_object": True},
    "eval_on_start": {**STEPS, "eval_on_start": True},
    "eval_delay": {**STEPS, "eval_delay": 2},
    "eval_steps": {"eval_strategy": "steps", "eval_steps": 2},
    "eval_strategy": {"eval_strategy": "epoch"},
    "bf16_full_eval": {"bf16_full_eval": True},
    "fp16_full_eval": {"fp16_full_eval": True},
    "load_best_model_at_end": {**BEST, "metric_for_best_model": "eval_accuracy"},
    "metric_for_best_model": {**STEPS, "save_strategy": "best", "metric_for_best_model": "accuracy"},
    "greater_is_better": {**BEST, "metric_for_best_model": "rewards/margins", "greater_is_better": False},
    "label_names": {"label_names": ["labels"]},
    "skip_memory_metrics": {"skip_memory_metrics": False},
    "include_num_input_tokens_seen": {"include_num_input_tokens_seen": "all"},
    "per_device_eval_batch_size": {"per_device_eval_batch_size": 2},
    "do_eval": {"do_eval": True},
    "do_predict": {"do_predict": True},
}
REFUSED = {
    "include_for_metrics": (["inputs"], "leave the others out"),
    "label_smoothing_factor": (0.1, "label_smoothing is the probability"),
    "label_names": (["chosen"], "weights as labels; leave it out"),
    "prediction_loss_only": (True, "leave one of the two out"),
}


class Accuracy:
    """Weighted accuracy, of whole evaluations or batch by batch, and what it was made from."""

    def __init__(self):
        self.calls = []

    def __call__(self, given, compute_result: bool = True) -> dict[str, float]:
        parts = [given.predictions, given.label_ids, *([] if given.losses is None else [given.losses])]
        self.calls.append([np.concatenate([np.asarray(x) for x in part]) for part in map(_in_batches, parts)])
        if not compute_result:
            return {}
        parts = [np.concatenate(part) for part in zip(*self.calls, strict=True)]
        self.calls, rewards, weights = [], *parts[:2]
        right = rewards[:, 0] > rewards[:, 1]
        mean = {} if len(parts) == 2 else {"losses": float(parts[2].mean()), "groups": len(parts[2])}
        return {"accuracy": (right * weights).sum() / weights.sum(), "comparisons": len(weights), **mean}


def _in_batches(part) -> list:
    return part if isinstance(part, list) else [part]


def test_every_option_of_evaluations_has_its_place_here():
    about = re.compile("eval|metric|label|predict|best|tokens_seen|greater")
    options = {field.name for field in dataclasses.fields(TrainingArguments) if about.search(field.name)}
    assert not options - (WORKING.keys() | REFUSED.keys())


@pytest.mark.parametrize("option", WORKING)
def test_options_of_evaluations_work_with_metrics_of_ones_own(tmp_path, option, caplog):
    accuracy, options = Accuracy(), {"max_steps": 4, "per_device_eval_batch_size": 3, **WORKING[option]}
    trainer = make_trainer(tmp_path, eval_dataset=ranked(7), compute_metrics=accuracy, **options)
    trainer.train()
    found = trainer.evaluate()
    assert found["eval_comparisons"] == 27 and 0 <= found["eval_accuracy"] <= 1
    if "include_for_metrics" in options:
        assert found["eval_groups"] == 7 and found["eval_losses"] == pytest.approx(found["eval_loss"], rel=1e-6)
    whole = plain_predictions(tmp_path, trainer)
    half = option in ("bf16_full_eval", "fp16_full_eval")
    assert found["eval_loss"] == pytest.approx(whole.metrics["test_loss"], rel=1e-2 if half else 1e-6)
    if not half:
        rewards, weights = whole.predictions, whole.label_ids
        accuracy = (rewards[:, 0] > rewards[:, 1]) @ weights / weights.sum()
        assert found["eval_accuracy"] == pytest.approx(accuracy, rel=1e-6)
    assert not [record.message for record in caplog.records if "Tried to track" in record.message]


def plain_predictions(tmp_path, trainer):
    """The trained model's, by a trainer without any such option."""
    size = trainer.args.per_device_eval_batch_size
    plain = make_trainer(tmp_path, eval_dataset=ranked(7), per_device_eval_batch_size=size)
    plain.model.load_state_dict(trainer.model.state_dict())
    return plain.predict(plain.eval_dataset)


@pytest.mark.parametrize("option", REFUSED)
def test_options_that_cannot_work_are_refused_by_name(tmp_path, option):
    value, words = REFUSED[option]
    with pytest.raises(ValueError, match=f"^{option}=.*{words}"):
        make_trainer(tmp_path, eval_dataset=ranked(7), compute_metrics=Accuracy(), **{option: value})


def test_a_loss_alone_is_there_for_who_has_no_metrics_of_their_own(tmp_path):
    trainer = make_trainer(tmp_path, eval_dataset=ranked(7), prediction_loss_only=True)
    trainer.train()
    assert math.isfinite(trainer.evaluate()["eval_loss"]) and trainer.predict(ranked(7)).predictions is None


def test_a_search_is_refused_and_told_its_loop(tmp_path):
    with pytest.raises(InputError, match="^hyperparameter_search: .*DPOTrainer.*DPOConfig"):
        make_trainer(tmp_path).hyperparameter_search(n_trials=2)
    with pytest.raises(InputError, match="^model_init=.* is no argument of DPOTrainer; give model=…, and make a tr"):
        DPOTrainer(tiny_model("llama"), train_dataset=pairs(), model_init=lambda: tiny_model("llama"))
    found = {}
    for beta in (0.05, 0.5):
        trial = make_trainer(tmp_path, eval_dataset=pairs(6, seed=1), beta=beta)
        trial.train()
        found[beta] = trial.evaluate()["eval_rewards/margins"]
    assert found[0.05] != found[0.5] and trial.reference.store.computed == 0, "the second trial computes no reference"
