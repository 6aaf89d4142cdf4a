"""Every evaluation reports under its own names, and nothing of one shows in the next."""

from __future__ import annotations

import math

import pytest
from datasets import Dataset

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
