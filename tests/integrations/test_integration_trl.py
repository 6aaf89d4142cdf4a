"""The accelerated trainer trains as TRL's own: every step within 1e-4 relative in fp32, on fewer token positions."""

from __future__ import annotations

import pytest
import torch

from causal_lms import causal_lm
from families import tiny_model, tiny_tokenizer
from preferences import pairs

trl = pytest.importorskip("trl")
peft = pytest.importorskip("peft")

from dpo_fast.integrations.trl import DPOTrainer, patch_trl, unpatch_trl  # noqa: E402

STEPS = 10
TOLERANCE = 1e-4
TIMES = ("runtime", "per_second", "total_flos")

# Options of TRL's DPOConfig; names with an underscore are for `make`.
QUICK = {
    "sigmoid": {},
    "mix with sft": {"loss_type": ["sigmoid", "sft"], "loss_weights": [0.8, 0.3]},
    "aot smoothed": {"loss_type": ["aot"], "label_smoothing": 0.2, "beta": 1.0},
    "full, precomputed": {"precompute_ref_log_probs": True},
    "LoRA": {"_lora": True},
    "LD-DPO, precomputed": {"ld_alpha": 0.3, "beta": 1.0, "precompute_ref_log_probs": True},
    "WPO": {"use_weighting": True},
    "mixture of experts with aux loss": {"_family": "mixtral", "router_aux_loss_coef": 0.02},
    "gradient accumulation": {"gradient_accumulation_steps": 3, "loss_type": ["ipo", "sft"], "logging_steps": 2},
    "truncation from the left": {"max_length": 9, "truncation_mode": "keep_end"},
    "patch_trl": {"_patched": True, "loss_type": ["robust"], "label_smoothing": 0.1},
}
OTHERS = {
    "hinge": {"loss_type": ["hinge"]},
    "ipo": {"loss_type": ["ipo"]},
    "robust smoothed": {"loss_type": ["robust"], "label_smoothing": 0.2},
    "exo_pair": {"loss_type": ["exo_pair"], "label_smoothing": 0.1},
    "sigmoid_norm": {"loss_type": ["sigmoid_norm"]},
    "discopop": {"loss_type": ["discopop"], "discopop_tau": 0.5, "beta": 1.0},
    "nca_pair": {"loss_type": ["nca_pair"]},
    "bco_pair": {"loss_type": ["bco_pair"]},
    "sppo_hard": {"loss_type": ["sppo_hard"]},
    "apo_zero and apo_down": {"loss_type": ["apo_zero", "apo_down"]},
    "aot_unpaired in a mix": {"loss_type": ["sigmoid", "aot_unpaired", "sft"], "loss_weights": [1.0, 0.5, 0.2]},
    "aot of a batch larger than a tile": {"loss_type": ["aot"], "per_device_train_batch_size": 100, "_rows": 100},
    "one loss twice": {"loss_type": ["sigmoid", "sigmoid"], "loss_weights": [0.5, 0.7]},
    "sigmoid smoothed, which TRL ignores": {"loss_type": ["sigmoid", "robust"], "label_smoothing": 0.2},
    "forward KL": {"f_divergence_type": "forward_kl"},
    "Jensen-Shannon, ipo": {"loss_type": ["ipo"], "f_divergence_type": "js_divergence"},
    "alpha divergence": {"f_divergence_type": "alpha_divergence", "f_alpha_divergence_coef": 0.7},
    "LD-DPO": {"ld_alpha": 0.3, "beta": 1.0},
    "LD-DPO of a sorted mix": {"loss_type": ["ipo", "sft", "aot"], "loss_weights": [0.1, 1.0, 1.0], "ld_alpha": 0.5},
    "LD-DPO with WPO": {"loss_type": ["robust"], "ld_alpha": 0.2, "use_weighting": True},
    "LoRA, precomputed": {"_lora": True, "precompute_ref_log_probs": True},
    "LoRA, LD-DPO, precomputed": {"_lora": True, "precompute_ref_log_probs": True, "ld_alpha": 0.3},
    "an adapter that goes on": {"_adapter": True},
    "an adapter that goes on, precomputed": {"_adapter": True, "precompute_ref_log_probs": True},
    "ref_model": {"_ref_model": True},
    "ref_model, precomputed": {"_ref_model": True, "precompute_ref_log_probs": True},
    "reference that follows": {"sync_ref_model": True, "ref_model_sync_steps": 3, "ref_model_mixup_alpha": 0.5},
    "evaluation between steps": {"eval_strategy": "steps", "eval_steps": 3, "logging_steps": 4},
    "gradient checkpointing": {"gradient_checkpointing": True},
    "gradient checkpointing, LoRA": {"gradient_checkpointing": True, "_lora": True},
    "padding_free": {"padding_free": True},
    "truncation": {"max_length": 12},
    "pairs one by one": {"per_device_train_batch_size": 1, "loss_type": ["aot", "sigmoid"]},
    "padded to a multiple": {"pad_to_multiple_of": 16},
    "scaled logits, sliding windows": {"_family": "cohere2"},
    # Keys' biases have no gradient but rounding, which Adam would blow up.
    "biases, tied head, learned positions": {"_family": "gpt2", "optim": "sgd", "learning_rate": 0.03},
    "batches that a main process shares out": {"accelerator_config": {"dispatch_batches": True}},
    "patch_trl, LoRA, precomputed": {"_patched": True, "_lora": True, "precompute_ref_log_probs": True},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    for family in ("llama", "mixtral", "cohere2", "gpt2", "mamba", "qwen2"):
        tiny_model(family).save_pretrained(folder / family)
    causal_lm("bert", is_decoder=False).save_pretrained(folder / "bert")
    adapter = peft.get_peft_model(tiny_model("llama"), lora())
    with torch.no_grad():
        for name, parameter in adapter.named_parameters():
            if "lora_B" in name:
                parameter += 0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1))
    adapter.save_pretrained(folder / "adapter")
    return folder


def lora():
    return peft.LoraConfig(r=4, lora_alpha=16, target_modules=["q_proj", "v_proj", "up_proj"], task_type="CAUSAL_LM")


def make(trainer_class, folder, **options):
    """A trainer of a fresh copy of the same tiny model."""
    flags = {name: options.pop(name) for name in list(options) if name.startswith("_")}
    family = flags.get("_family", "llama")
    args = trl.DPOConfig(
        **{
            "output_dir": str(folder / "out"),
            "use_cpu": True,
            "bf16": False,
            "report_to": [],
            "per_device_train_batch_size": 4,
            "learning_rate": 3e-4,
            "logging_steps": 1,
            "max_steps": STEPS,
            "save_strategy": "no",
            "gradient_checkpointing": False,
            "disable_tqdm": True,
            "max_length": 20,
            **options,
        }
    )
    model = str(folder / family)
    if "_adapter" in flags:
        model = peft.PeftModel.from_pretrained(tiny_model("llama"), folder / "adapter", is_trainable=True)
    return trainer_class(
        model=model,
        ref_model=tiny_model(family, seed=7) if "_ref_model" in flags else None,
        args=args,
        train_dataset=pairs(flags.get("_rows", 40)),
        eval_dataset=pairs(8, seed=5),
        processing_class=tiny_tokenizer(),
        peft_config=lora() if "_lora" in flags else flags.get("_peft_config"),
        data_collator=flags.get("_collator"),
        compute_metrics=flags.get("_compute_metrics"),
    )


def count_positions(trainer) -> list[int]:
    """The token positions of every forward from here on, of policy and reference."""
    positions = []
    for model in {trainer.model, trainer.ref_model} - {None}:
        base = model.get_base_model() if hasattr(model, "peft_config") else model
        base.get_input_embeddings().register_forward_hook(lambda _, inputs, __: positions.append(inputs[0].numel()))
    return positions


def trained(trainer_class, folder, **options):
    """The trainer after training and evaluation, and the token positions that took."""
    trainer = make(trainer_class, folder, **options)
    positions = count_positions(trainer)
    trainer.train()
    trainer.evaluate()
    return trainer, sum(positions)


def compared(row, first):
    """What to compare of a row of the log: no times, and in the first row, where the policy still is the reference, no
    accuracy of rewards, which are 0 within rounding."""
    return [
        name
        for name in row
        if not any(part in name for part in TIMES) and not (row is first and name == "rewards/accuracies")
    ]


def assert_same_log(mine, theirs):
    """Every number of every row of the log, within TOLERANCE."""
    first = theirs.state.log_history[0]
    assert len(mine.state.log_history) == len(theirs.state.log_history) > 1
    for row, other in zip(mine.state.log_history, theirs.state.log_history, strict=True):
        assert row.keys() == other.keys()
        for name in compared(other, first):
            assert type(row[name]) in (int, float), f"{name} is a {type(row[name]).__name__}"
            # A reward is β times a difference of log-probs, each of which is right to 1e-4 nat.
            bound = TOLERANCE * max(abs(other[name]), mine.args.beta if "rewards" in name else 0.0) + 1e-7
            assert abs(row[name] - other[name]) <= bound, f"step {row['step']}: {name} {row[name]}, TRL {other[name]}"


def assert_same_weights(mine, theirs):
    for (name, a), b in zip(mine.model.named_parameters(), theirs.model.parameters(), strict=True):
        assert torch.allclose(a, b, rtol=1e-3, atol=2e-5), name


def assert_trains_as_trl(folder, name, options):
    theirs, their_positions = trained(trl.DPOTrainer, folder, **options)
    if "_patched" in options:
        patch_trl()
        try:
            mine, my_positions = trained(trl.DPOTrainer, folder, **options)
        finally:
            unpatch_trl()
    else:
        mine, my_positions = trained(DPOTrainer, folder, **options)
    print(f"{name}: {my_positions} token positions, TRL {their_positions}")
    assert_same_log(mine, theirs)
    assert_same_weights(mine, theirs)
    assert my_positions < their_positions


@pytest.mark.parametrize("name", QUICK)
def test_ten_steps_equal_trl(folder, name):
    assert_trains_as_trl(folder, name, QUICK[name])


@pytest.mark.slow
@pytest.mark.parametrize("name", OTHERS)
def test_ten_steps_of_every_other_configuration_equal_trl(folder, name):
    assert_trains_as_trl(folder, name, OTHERS[name])


def test_a_model_that_cannot_share_prompts_equals_trl(folder):
    theirs, their_positions = trained(trl.DPOTrainer, folder, _family="mamba", max_steps=4)
    mine, my_positions = trained(DPOTrainer, folder, _family="mamba", max_steps=4)
    assert mine._packing.layout == "padded"
    assert_same_log(mine, theirs)
    assert_same_weights(mine, theirs)
    assert my_positions == their_positions


@pytest.mark.parametrize("by", [trl.DPOTrainer, DPOTrainer], ids=["TRL", "ours"])
def test_resuming_a_checkpoint_of_either_equals_trl(folder, tmp_path, by):
    """Rows differ from step to step, so a wrong place in the data or in the schedule would show."""
    options = {"save_strategy": "steps", "save_steps": 4, "max_steps": 8, "output_dir": str(tmp_path / "out")}
    make(by, folder, **options).train()
    checkpoint, logs = str(tmp_path / "out" / "checkpoint-4"), []
    for trainer_class in (DPOTrainer, trl.DPOTrainer):
        trainer = make(trainer_class, folder, **{**options, "output_dir": str(tmp_path / trainer_class.__module__)})
        trainer.train(resume_from_checkpoint=checkpoint)
        trainer.evaluate()
        logs.append(trainer)
    assert [row["step"] for row in logs[0].state.log_history if "loss" in row] == [*range(1, 9)]
    assert_same_log(*logs)
    assert_same_weights(*logs)


def test_datasets_given_to_evaluate_equal_trl(folder):
    """Also after training, when only an adapter's reference is still there; a dict of datasets has a prefix each."""
    found = []
    for trainer_class in (trl.DPOTrainer, DPOTrainer):
        trainer = make(trainer_class, folder, _lora=True, precompute_ref_log_probs=True, max_steps=3)
        trainer.train()
        found.append(trainer.evaluate({"few": pairs(5, seed=8), "more": pairs(11, seed=9)}))
    theirs, mine = found
    assert mine.keys() == theirs.keys()
    assert {"eval_few_loss", "eval_more_loss"} <= mine.keys()
    for name in (name for name in theirs if not any(part in name for part in TIMES)):
        assert mine[name] == pytest.approx(theirs[name], rel=TOLERANCE, abs=1e-5), name


class WithALossOfItsOwn:
    """What subclasses of TRL's trainer do: take the fused head's log-probs of padded rows."""

    def _compute_loss(self, model, inputs, return_outputs):
        rows = {name: inputs[name] for name in ("input_ids", "attention_mask")}
        labels = inputs["input_ids"].masked_fill(inputs["completion_mask"] == 0, -100)
        found = model(**rows, labels=labels, use_cache=False, fused_lm_head=True)
        assert set(inputs) == {"input_ids", "attention_mask", "completion_mask"}
        chosen, rejected = found.log_probs.sum(dim=1).chunk(2)
        for name in ("entropy", "mean_logits", "is_top1"):
            values = getattr(found, name).float() * torch.arange(1, labels.shape[1])  # a wrong place would show
            self._metrics["train" if self.model.training else "eval"][name].append(values.mean().item())
        return -(chosen - rejected).mean() + (found.log_probs**2).mean()


def test_a_subclass_with_a_loss_of_its_own_is_answered_from_packed_rows(folder):
    theirs = trained(type("Theirs", (WithALossOfItsOwn, trl.DPOTrainer), {}), folder)
    mine = trained(type("Mine", (WithALossOfItsOwn, DPOTrainer), {}), folder)
    assert_same_log(mine[0], theirs[0])
    assert mine[1] < theirs[1]


@pytest.mark.parametrize("options", [{"init_lora_weights": "pissa"}, {"bias": "all"}, {"init_lora_weights": "olora"}])
def test_the_reference_is_the_given_model_where_an_adapter_changes_it(folder, options):
    """TRL's own is what is left of the model without the adapter: PiSSA's first loss is not ln 2 there."""
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM", **options)
    losses = []
    for precompute in (False, True):
        trainer = make(
            DPOTrainer, folder, _family="qwen2", _peft_config=config, precompute_ref_log_probs=precompute,
            learning_rate=1e-2, beta=1.0,
        )  # fmt: skip
        trainer.train()
        losses.append([row["loss"] for row in trainer.state.log_history if "loss" in row])
    assert losses[0][0] == pytest.approx(0.6931472, abs=1e-5)
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)


def test_a_model_that_looks_ahead_is_left_to_trl(folder, caplog):
    trainer = make(DPOTrainer, folder, _family="bert", max_steps=1)
    assert trainer._packing is None and "looks at later tokens" in caplog.text
