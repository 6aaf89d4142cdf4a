"""The trainer: gradients independent of how a step is cut, exact resume, references computed once, refusals."""

from __future__ import annotations

import json
import math

import pytest
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM

from dpo_fast import losses
from dpo_fast.losses import LOSSES
from dpo_fast.model import agreement
from dpo_fast.model.forward import PackedOutput
from families import VOCAB, tiny_model
from preferences import assert_same_weights, logged, make_trainer, pairs, ranked, trained, words


@pytest.mark.parametrize("layout", ["shared", "padded"])
def test_first_loss_is_ln_2_and_training_lowers_it(tmp_path, layout):
    trainer = make_trainer(tmp_path, layout=layout, max_steps=20)
    trained(trainer)
    losses = logged(trainer, "loss")
    assert losses[0] == pytest.approx(math.log(2), abs=1e-6)
    assert sum(losses[-4:]) / 4 < 0.6
    assert logged(trainer, "rewards/accuracies")[-1] > 0.9


@pytest.mark.parametrize("loss_type", [["sigmoid"], ["hinge"], ["ipo"], ["sft"], ["sigmoid", "sft"], ["beta_dpo"]])
@pytest.mark.parametrize("dataset", [pairs, ranked])
def test_a_step_does_not_depend_on_how_it_is_cut(tmp_path, loss_type, dataset):
    """Whole batch = packs under a token bound = gradient accumulation, for pairs and for K-way groups."""
    cuts = {
        "whole": {},
        "packs": {"max_tokens_per_micro_batch": 45},
        "accumulated": {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 4},
        "both": {
            "per_device_train_batch_size": 2,
            "gradient_accumulation_steps": 2,
            "max_tokens_per_micro_batch": 45,
        },
    }
    weights, losses, norms = {}, {}, {}
    for name, options in cuts.items():
        # SGD: Adam would hide the scale of a gradient.
        trainer = make_trainer(tmp_path, dataset(), loss_type=loss_type, optim="sgd", learning_rate=0.05, **options)
        weights[name] = trained(trainer)
        losses[name], norms[name] = logged(trainer, "loss"), logged(trainer, "grad_norm")
    for name in cuts:
        assert_same_weights(weights["whole"], weights[name], 2e-6)
        assert losses[name] == pytest.approx(losses["whole"], rel=1e-5, abs=1e-6)
        assert norms[name] == pytest.approx(norms["whole"], rel=1e-4)


def test_a_group_equals_its_expanded_pairs(tmp_path):
    """One group of K completions gives the loss and gradient of its comparisons as separate rows."""
    row = {"prompt": "w5 w6 w7", "completions": [" w8 w9", " w10", " w11 w12 w13", " w14 w15"], "scores": [4, 3, 2, 1]}
    order = [(w, lo) for w in range(4) for lo in range(w + 1, 4)]
    expanded = [
        {"prompt": row["prompt"], "chosen": row["completions"][w], "rejected": row["completions"][lo]}
        for w, lo in order
    ]
    options = {"optim": "sgd", "learning_rate": 0.05, "max_steps": 1}
    group = trained(make_trainer(tmp_path, Dataset.from_list([row]), per_device_train_batch_size=1, **options))
    separate = trained(make_trainer(tmp_path, Dataset.from_list(expanded), per_device_train_batch_size=6, **options))
    merged = make_trainer(
        tmp_path, Dataset.from_list(expanded), per_device_train_batch_size=6, group_by_prompt=True, **options
    )
    assert_same_weights(group, separate, 1e-6)
    assert_same_weights(group, trained(merged), 1e-6)
    assert len(merged.train_dataset) == 1


@pytest.mark.parametrize("loss_type", ["sigmoid", "beta_dpo"])
def test_resume_is_exact(tmp_path, loss_type):
    """With all that a run remembers; β-DPO the running mean of its margins."""
    options = {"max_steps": 6, "save_strategy": "steps", "save_steps": 3, "loss_type": loss_type, "beta": 2.0}
    whole = make_trainer(tmp_path, **options)
    expected = trained(whole)
    resumed = make_trainer(tmp_path, **options)
    weights = trained(resumed, resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-3"))
    assert all(torch.equal(weights[name], expected[name]) for name in expected)
    assert logged(resumed, "loss")[3:] == logged(whole, "loss")[3:]
    assert logged(resumed, "num_tokens")[-1] == logged(whole, "num_tokens")[-1]


def count_forwards(trainer_module, monkeypatch) -> list:
    """Packed forwards from here on, without those of the audit and of comparisons before the start."""
    calls = []
    monkeypatch.setattr("dpo_fast.reference.reference.Reference._keep_copies", lambda self: True)
    monkeypatch.setattr("dpo_fast.reference.audit.StoreAudit._check", lambda *args: None)
    original, compare = trainer_module._packed_forward, agreement._difference
    monkeypatch.setattr(trainer_module, "_packed_forward", lambda *args: calls.append(args) or original(*args))

    def compare_uncounted(*args):
        before = list(calls)
        try:
            return compare(*args)
        finally:
            calls[:] = before

    monkeypatch.setattr(agreement, "_difference", compare_uncounted)
    return calls


def test_references_are_computed_once_and_only_what_is_missing(tmp_path, monkeypatch):
    from dpo_fast.model import forward

    calls = count_forwards(forward, monkeypatch)
    make_trainer(tmp_path, pairs(9).select(range(6)))
    assert len(calls) == 1
    again = make_trainer(tmp_path, pairs(9).select(range(6)), beta=0.3, learning_rate=1e-5, seed=3)
    assert len(calls) == 1, "same weights and rows: nothing to compute"
    more = make_trainer(tmp_path, pairs(9))
    assert len(calls) == 2
    assert len(calls[1][1].completion_lengths) <= 2 * 9
    for row, other in zip(again.train_dataset, more.train_dataset, strict=False):
        assert row["ref_logps"] == other["ref_logps"]
    make_trainer(tmp_path, pairs(9).select(range(6)), model=tiny_model("llama", seed=5))
    assert len(calls) == 3, "other weights: another reference"


def test_an_adapter_shares_the_references_of_its_base_model(tmp_path, monkeypatch):
    peft = pytest.importorskip("peft")
    from dpo_fast.model import forward

    calls = count_forwards(forward, monkeypatch)
    full = make_trainer(tmp_path)
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    lora = make_trainer(tmp_path, peft_config=config)
    assert len(calls) == 1
    assert lora.train_dataset["ref_logps"] == full.train_dataset["ref_logps"]
    weights = trained(lora)
    assert weights and all("lora" in name for name in weights)
    assert logged(lora, "loss")[0] == pytest.approx(math.log(2), abs=1e-6)
    held_out = lora.evaluate(pairs(4, seed=9))
    assert math.isfinite(held_out["eval_loss"])
    lora.save_model(str(tmp_path / "adapter"))
    base = tiny_model("llama")
    loaded = peft.PeftModel.from_pretrained(base, str(tmp_path / "adapter")).state_dict()
    saved = lora.model.state_dict()
    assert all(torch.equal(loaded[name], saved[name]) for name in loaded if "lora" in name)


def test_an_explicit_reference_is_used(tmp_path):
    reference = tiny_model("llama", seed=4)
    trainer = make_trainer(tmp_path, ref_model=reference, max_steps=1)
    own = make_trainer(tmp_path / "own")
    assert trainer.train_dataset["ref_logps"] != own.train_dataset["ref_logps"]
    trained(trainer)
    assert logged(trainer, "loss")[0] != pytest.approx(math.log(2), abs=1e-3)
    fresh = make_trainer(tmp_path, ref_model=tiny_model("llama", seed=4))
    with pytest.raises(ValueError, match="ref_model"):  # the policy must not stand in for it
        fresh.evaluate(pairs(4, seed=9))


def test_a_damaged_part_is_set_aside_and_recomputed(tmp_path, caplog):
    first = make_trainer(tmp_path)
    (part,) = (tmp_path / "reference").glob("*/part-*.parquet")
    data = bytearray(part.read_bytes())
    data[len(data) // 2] ^= 1
    part.write_bytes(data)
    second = make_trainer(tmp_path)
    assert "does not match its checksum" in caplog.text
    assert part.with_name(part.name + ".damaged").exists() and part.exists()
    assert second.train_dataset["ref_logps"] == first.train_dataset["ref_logps"]


def test_evaluation_reports_the_loss_and_metrics_of_the_held_out_rows(tmp_path):
    trainer = make_trainer(tmp_path, eval_dataset=pairs(7, seed=2), eval_strategy="steps", eval_steps=3, max_steps=6)
    trained(trainer)
    rows = [row for row in trainer.state.log_history if "eval_loss" in row]
    assert len(rows) == 2
    expected = {"loss", "entropy", "mean_token_accuracy", *(f"logits/{side}" for side in ("chosen", "rejected"))}
    expected |= {f"rewards/{name}" for name in ("chosen", "rejected", "accuracies", "margins")}
    expected |= {"logps/chosen", "logps/rejected"}
    assert {f"eval_{name}" for name in expected} <= rows[0].keys()
    predictions = trainer.predict(trainer.eval_dataset)
    margins = predictions.predictions[:, 0] - predictions.predictions[:, 1]
    assert rows[1]["eval_rewards/margins"] == pytest.approx(margins.mean(), rel=0.3)
    assert rows[1]["eval_loss"] == pytest.approx(-torch.tensor(margins).sigmoid().log().mean().item(), rel=0.05)


def test_a_dataset_that_comes_after_training_started_is_refused(tmp_path):
    trainer = make_trainer(tmp_path)
    before = trainer.evaluate(pairs(4, seed=8))
    assert before["eval_loss"] == pytest.approx(math.log(2), abs=1e-6)
    trained(trainer)
    with pytest.raises(ValueError, match="eval_dataset"):
        trainer.evaluate(pairs(4, seed=9))


def test_the_saved_model_is_an_ordinary_one(tmp_path):
    trainer = make_trainer(tmp_path)
    trained(trainer)
    trainer.save_model(str(tmp_path / "model"))
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    assert "dpo_fast" not in json.dumps(config)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    assert loaded.config._attn_implementation == "sdpa"
    for (name, a), b in zip(loaded.named_parameters(), trainer.model.parameters(), strict=True):
        assert torch.equal(a, b), name


def test_a_mixture_of_experts_logs_its_load_balancing_loss(tmp_path):
    model = tiny_model("mixtral", router_aux_loss_coef=0.02)
    trainer = make_trainer(tmp_path, model=model, max_steps=1)
    trained(trainer)
    (aux_loss,) = logged(trainer, "aux_loss")
    assert logged(trainer, "loss")[0] == pytest.approx(math.log(2) + 0.02 * aux_loss, abs=1e-5)


def test_models_that_cannot_share_prompts_train_padded_and_say_so(tmp_path, caplog):
    trainer = make_trainer(tmp_path, model=tiny_model("mamba"), max_steps=2)
    assert trainer.layout == "padded" and "takes 'padded'" in caplog.text
    trained(trainer)
    assert logged(trainer, "loss")[0] == pytest.approx(math.log(2), abs=1e-6)
    with pytest.raises(ValueError, match="recurrent state"):
        make_trainer(tmp_path, model=tiny_model("mamba"), layout="shared")


def test_a_step_reads_nothing_back_from_the_device(tmp_path):
    """Every read of a tensor's value on the host is a `_local_scalar_dense`: there is none outside logging.

    What the kernels' ops do inside is not seen here; the tests that need a GPU forbid synchronisation there.
    """
    from torch.utils._python_dispatch import TorchDispatchMode

    class NoReads(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            assert function is not torch.ops.aten._local_scalar_dense.default, "a value was read back on the host"
            return function(*args, **kwargs or {})

    trainer = make_trainer(tmp_path, logging_steps=100)
    step = trainer.training_step
    calls = []

    def guarded(*args, **kwargs):
        with NoReads():
            calls.append(1)
            return step(*args, **kwargs)

    trainer.training_step = guarded
    trainer.train()
    assert len(calls) == 3
    with pytest.raises(AssertionError, match="read back"), NoReads():
        torch.ones(1).item()


@pytest.mark.parametrize("name", ["simpo", "cpo", "orpo", "nll"])
def test_a_loss_without_a_reference_runs_none(tmp_path, name):
    trainer = make_trainer(tmp_path, loss_type=[name], max_steps=3, beta=2.0, eval_dataset=pairs(4, seed=5))
    assert trainer.reference is None and "ref_logps" not in trainer.train_dataset.column_names
    trainer.train()
    held_out = trainer.evaluate(pairs(4, seed=6))
    assert trainer.reference is None, "a new held-out set needs none either"
    assert math.isfinite(held_out["eval_loss"])
    row = trainer.state.log_history[0]
    assert row["rewards/chosen"] == pytest.approx(2.0 * row["logps/chosen"], rel=1e-5), "rewards are β times log-probs"
    with pytest.raises(ValueError, match="ref_model is given"):
        make_trainer(tmp_path, loss_type=[name], ref_model=tiny_model("llama"))


def test_a_function_of_ones_own_trains_like_any_loss(tmp_path, monkeypatch):
    monkeypatch.setattr("dpo_fast.losses.catalogue.LOSSES", dict(LOSSES))

    def logistic(comparisons, parameters):
        delta = comparisons.winner_ratios - comparisons.loser_ratios
        return torch.nn.functional.softplus(-parameters.beta * delta)

    mine, usual = (make_trainer(tmp_path, loss_type=loss) for loss in (logistic, "sigmoid"))
    for trainer in (mine, usual):
        trainer.train()
    assert mine.args.loss_type == ["logistic"], "a name, so that the configuration can be saved"
    rows = pairs().add_column("offset", [0.5] * len(pairs()))
    make_trainer(tmp_path, rows, loss_type=logistic, label_smoothing=0.1)  # which it may heed, for all we know
    for one, other in zip(mine.model.parameters(), usual.model.parameters(), strict=True):
        assert torch.allclose(one, other, atol=1e-6)


def test_a_function_of_ones_own_that_couples_a_step_says_so_and_does_not_depend_on_how_it_is_cut(tmp_path, monkeypatch):
    monkeypatch.setattr("dpo_fast.losses.catalogue.LOSSES", dict(LOSSES))

    def centred(comparisons, parameters):
        delta = parameters.beta * (comparisons.winner_ratios - comparisons.loser_ratios)
        return torch.nn.functional.softplus(delta.mean() - 2 * delta)

    with pytest.raises(ValueError, match=r"^loss_type: the loss centred .*loss\(step=True\)"):
        make_trainer(tmp_path, loss_type=centred)
    cuts = [
        {},
        {"max_tokens_per_micro_batch": 45},
        {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 4},
    ]
    whole, *others = (trained(make_trainer(tmp_path, loss_type=losses.loss(step=True)(centred), **cut)) for cut in cuts)
    for other in others:
        assert_same_weights(whole, other, 1e-5)


@pytest.mark.parametrize("name", ["aot", "aot_unpaired"])
def test_a_coupled_loss_does_not_depend_on_how_a_step_is_cut(tmp_path, name):
    """One pack of 4, packs under a token budget, and 2 × 2 or 4 × 1 micro-batches: the same losses and weights."""
    cuts = [
        {"per_device_train_batch_size": 4},
        {"per_device_train_batch_size": 4, "max_tokens_per_micro_batch": 45},
        {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2},
        {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 4},
    ]
    trainers = [make_trainer(tmp_path, loss_type=[name, "sft"], beta=1.0, **cut) for cut in cuts]
    packs = []
    for trainer in trainers:
        step = trainer.training_step
        trainer.training_step = lambda model, inputs, *rest, step=step: (
            packs.append(len(inputs["packs"])) or step(model, inputs, *rest)
        )
        trainer.train()
    assert max(packs) > 1, "the token budget cuts"
    logs = [[row for row in trainer.state.log_history if "loss" in row] for trainer in trainers]
    for other, log in zip(trainers[1:], logs[1:], strict=True):
        for mine, row in zip(logs[0], log, strict=True):
            for key in ("loss", "grad_norm"):
                assert row[key] == pytest.approx(mine[key], rel=1e-4), key
        for a, b in zip(trainers[0].model.parameters(), other.model.parameters(), strict=True):
            assert torch.allclose(a, b, atol=2e-5)


def groups_of_four(count: int = 8) -> Dataset:
    generator = torch.Generator().manual_seed(0)
    rows = [
        {
            "prompt": words(4, generator),
            "completions": [" " + words(5, generator) for _ in range(4)],
            "scores": [4.0, 3.0, 2.0, 1.0],
        }
        for _ in range(count)
    ]
    return Dataset.from_list(rows)


def test_groups_of_four_train_and_report_how_they_are_ranked(tmp_path):
    trainer = make_trainer(tmp_path, groups_of_four(), loss_type=["plackett_luce"], max_steps=12, learning_rate=1e-2)
    trainer.train()
    rows = [row for row in trainer.state.log_history if "loss" in row]
    assert abs(rows[0]["rewards/margins"]) < 1e-6, "all rewards are 0 at first, but for rounding"
    assert rows[0]["loss"] == pytest.approx((math.log(4) + math.log(3) + math.log(2)) / 6, rel=1e-5)
    assert rows[-1]["rewards/kendall_tau"] > 0.5 and rows[-1]["rewards/best_of_k"] > 0.5
    assert rows[-1]["loss"] < rows[0]["loss"]


def test_offsets_are_margins_of_the_loss(tmp_path):
    rows = pairs().add_column("offset", [0.5] * len(pairs()))
    trainer = make_trainer(tmp_path, rows, max_steps=1)
    trainer.train()
    assert trainer.state.log_history[0]["loss"] == pytest.approx(math.log1p(math.exp(0.5)), rel=1e-5)
    with pytest.raises(ValueError, match="^offset: .*ipo"):
        make_trainer(tmp_path, rows, loss_type=["ipo"])


def test_sorting_refuses_weights_that_differ(tmp_path):
    rows = pairs().add_column("weight", [1.0, 2.0] * (len(pairs()) // 2))
    with pytest.raises(ValueError, match="^weight: .*aot"):
        make_trainer(tmp_path, rows, loss_type=["sigmoid", "aot"])
    make_trainer(tmp_path, rows.map(lambda row: {"weight": 2.0}), loss_type=["sigmoid", "aot"])


def test_rpo_alpha_adds_the_winners_likelihood(tmp_path):
    one = make_trainer(tmp_path, max_steps=2, rpo_alpha=0.5)
    other = make_trainer(tmp_path, max_steps=2, loss_type=["sigmoid", "nll"], loss_weights=[1.0, 0.5])
    for trainer in (one, other):
        trainer.train()
    losses = [[row["loss"] for row in trainer.state.log_history if "loss" in row] for trainer in (one, other)]
    assert losses[0] == losses[1] and losses[0][0] > math.log(2) + 0.1


def test_statistics_can_be_left_out(tmp_path):
    trainer = make_trainer(tmp_path, log_completion_statistics=False, max_steps=1)
    trained(trainer)
    assert not logged(trainer, "entropy") and logged(trainer, "rewards/margins")
    assert PackedOutput().entropy is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dataset": Dataset.from_dict({"text": ["w3"]})}, "text"),
        (
            {"dataset": Dataset.from_dict({"prompt": ["w3"], "chosen": [" w4"], "rejected": [" w4"]})},
            "none of the 1 rows",
        ),
        ({"max_length": 2}, "max_length"),
        ({"beta": 0.0}, "beta"),
        ({"loss_type": "nope"}, "loss_type"),
        ({"ref_model": "same"}, "ref_model"),
        ({"ref_model": "smaller"}, "token embeddings"),
        ({"peft_config": "adapter"}, "peft_config"),
        ({"router_aux_loss_coef": 0.1}, "router_aux_loss_coef"),
        (
            {"dataset": Dataset.from_dict({"prompt_ids": [[3]], "chosen_ids": [[VOCAB]], "rejected_ids": [[4]]})},
            "vocab",
        ),
    ],
)
def test_bad_input_is_refused_by_name(tmp_path, change, message):
    model = tiny_model("llama")
    references = {"same": model, "smaller": tiny_model("llama", vocab_size=50)}
    if isinstance(change.get("ref_model"), str):
        change = {**change, "ref_model": references[change["ref_model"]]}
    dataset = change.get("dataset")
    options = {name: value for name, value in change.items() if name != "dataset"}
    with pytest.raises(ValueError, match=message):
        make_trainer(tmp_path, dataset, model=model, **options)


def test_a_checkpoint_that_does_not_fit_is_refused_before_training(tmp_path):
    peft = pytest.importorskip("peft")
    options = {"max_steps": 1, "save_strategy": "steps", "save_steps": 1}
    trained(make_trainer(tmp_path, **options))
    checkpoint = str(tmp_path / "out" / "checkpoint-1")
    config = peft.LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM")
    adapter = make_trainer(tmp_path / "lora", peft_config=config, **options)
    adapter.train()
    adapter_checkpoint = str(tmp_path / "lora" / "out" / "checkpoint-1")
    wider = peft.LoraConfig(r=8, target_modules=["q_proj"], task_type="CAUSAL_LM")
    cases = [
        (make_trainer(tmp_path, model=tiny_model("llama", intermediate_size=64)), checkpoint, "of shape"),
        (make_trainer(tmp_path, model=tiny_model("gpt2")), checkpoint, "another model's"),
        (make_trainer(tmp_path), adapter_checkpoint, "holds an adapter"),
        (adapter, checkpoint, "whole model"),
        (make_trainer(tmp_path, peft_config=wider), adapter_checkpoint, "of shape"),
        (adapter, str(tmp_path), "trainer_state.json"),
        (make_trainer(tmp_path / "empty"), True, "holds no checkpoint"),
    ]
    for trainer, folder, message in cases:
        with pytest.raises(ValueError, match=message):
            trainer.train(resume_from_checkpoint=folder)
    adapter.train(resume_from_checkpoint=adapter_checkpoint)


def test_missing_models_are_refused(tmp_path):
    with pytest.raises(ValueError, match="does not exist"):
        make_trainer(tmp_path, model=str(tmp_path / "nowhere"))
    with pytest.raises(ValueError, match="config.json"):
        make_trainer(tmp_path, model=str(tmp_path))
