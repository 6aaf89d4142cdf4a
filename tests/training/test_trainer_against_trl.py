"""20 steps in fp32 equal TRL 1.16's within 1e-4: every loss, full and LoRA, with and without precomputed references.

Where TRL itself is wrong or fails, a test shows it and what happens here.
"""

from __future__ import annotations

import pytest
import torch

from dpo_fast.config import DPOConfig
from dpo_fast.trainer import DPOTrainer
from families import tiny_model, tiny_tokenizer
from preferences import pairs

trl = pytest.importorskip("trl")
peft = pytest.importorskip("peft")

STEPS = 20
SHARED_METRICS = [
    "loss",
    "grad_norm",
    "learning_rate",
    "epoch",
    "entropy",
    "mean_token_accuracy",
    *(f"logits/{side}" for side in ("chosen", "rejected")),
    *(f"logps/{side}" for side in ("chosen", "rejected")),
    *(f"rewards/{name}" for name in ("chosen", "rejected", "accuracies", "margins")),
]
TOLERANCE = 1e-4

CONFIGURATIONS = {
    "sigmoid": {},
    "hinge": {"loss_type": ["hinge"]},
    "ipo": {"loss_type": ["ipo"]},
    "sft": {"loss_type": ["sft"]},
    "mix": {"loss_type": ["sigmoid", "sft", "ipo"], "loss_weights": [0.8, 0.3, 0.01]},
}


def run(trainer_class, config_class, folder, name, lora, **options):
    """Trains a fresh copy of the same tiny model and returns its log, one row a step."""
    options = {"max_steps": STEPS, **options}
    args = config_class(
        output_dir=str(folder / name),
        use_cpu=True,
        bf16=False,
        report_to=[],
        per_device_train_batch_size=4,
        learning_rate=3e-4,
        logging_steps=1,
        save_strategy="no",
        gradient_checkpointing=False,
        disable_tqdm=True,
        max_length=20,
        **options,
    )
    config = peft.LoraConfig(r=4, lora_alpha=16, lora_dropout=0.0, target_modules=["q_proj", "v_proj", "up_proj"])
    trainer = trainer_class(
        model=str(folder / "model"),
        args=args,
        train_dataset=pairs(40),
        eval_dataset=pairs(8, seed=5),
        processing_class=tiny_tokenizer(),
        peft_config=config if lora else None,
    )
    trainer.train()
    trainer.evaluate()
    return trainer


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    tiny_model("llama").save_pretrained(folder / "model")
    tiny_model("mixtral", router_aux_loss_coef=0.02).save_pretrained(folder / "moe" / "model")
    return folder


@pytest.fixture(scope="module")
def ours(folder):
    """Our runs, one for each configuration: they do not depend on how TRL gets its references."""
    runs = {}

    def get(name: str, lora: bool):
        if (name, lora) not in runs:
            options = {**CONFIGURATIONS[name], "reference_cache_dir": str(folder / "reference")}
            runs[name, lora] = run(DPOTrainer, DPOConfig, folder, "ours", lora, **options)
        return runs[name, lora]

    return get


def assert_same_log(ours, theirs, names, prefix=""):
    rows = [[row for row in log.state.log_history if f"{prefix}loss" in row] for log in (ours, theirs)]
    assert len(rows[0]) == len(rows[1]) > 0
    for step, (mine, other) in enumerate(zip(*rows, strict=True)):
        for name in (f"{prefix}{name}" for name in names):
            # A reward is β times a difference of log-probs, each of which is right to 1e-4 nat.
            bound = TOLERANCE * max(abs(other[name]), ours.args.beta if "rewards" in name else 0.0) + 1e-7
            assert abs(mine[name] - other[name]) <= bound, f"step {step}: {name} {mine[name]} against {other[name]}"


@pytest.mark.parametrize("precompute", [False, True], ids=["live", "precomputed"])
@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_twenty_steps_equal_trl(folder, ours, name, lora, precompute):
    theirs = run(
        trl.DPOTrainer,
        trl.DPOConfig,
        folder,
        "theirs",
        lora,
        precompute_ref_log_probs=precompute,
        **CONFIGURATIONS[name],
    )
    mine = ours(name, lora)
    assert_same_log(mine, theirs, SHARED_METRICS)
    held_out = [name for name in SHARED_METRICS if name not in ("grad_norm", "learning_rate", "epoch")]
    assert_same_log(mine, theirs, held_out, prefix="eval_")
    for (parameter_name, a), b in zip(mine.model.named_parameters(), theirs.model.parameters(), strict=True):
        assert torch.allclose(a, b, rtol=1e-3, atol=2e-5), parameter_name


BRIEF = {
    **{name: {} for name in ("nca_pair", "bco_pair", "sppo_hard", "apo_zero", "apo_down", "discopop", "sigmoid_norm")},
    "discopop sharp": {"loss_type": ["discopop"], "discopop_tau": 0.5, "beta": 1.0},
    "exo_pair": {"label_smoothing": 0.1},
    "robust": {"label_smoothing": 0.2},
    "sigmoid_norm in forward KL": {"loss_type": ["sigmoid_norm"], "f_divergence_type": "forward_kl"},
    "aot": {},
    "aot smoothed": {"loss_type": ["aot"], "label_smoothing": 0.2, "beta": 1.0},
    "aot_unpaired": {},
    "LD-DPO": {"loss_type": ["sigmoid"], "ld_alpha": 0.3, "beta": 1.0},
    "LD-DPO of a mix": {"loss_type": ["ipo", "sft", "aot"], "loss_weights": [0.1, 1.0, 1.0], "ld_alpha": 0.5},
    "LD-DPO with WPO in JS": {
        "loss_type": ["robust"],
        "ld_alpha": 0.2,
        "use_weighting": True,
        "f_divergence_type": "js_divergence",
    },
    "aot in a mix": {"loss_type": ["sigmoid", "aot_unpaired", "sft"], "loss_weights": [1.0, 0.5, 0.2]},
    "WPO": {"loss_type": ["sigmoid"], "use_weighting": True},
    "WPO of a mix": {"loss_type": ["ipo", "robust"], "loss_weights": [0.1, 2.0], "use_weighting": True},
    "mix in JS": {"loss_type": ["robust", "sft"], "f_divergence_type": "js_divergence", "label_smoothing": 0.1},
    "hinge in JS": {"loss_type": ["hinge"], "f_divergence_type": "js_divergence"},
    "ipo in alpha": {"loss_type": ["ipo"], "f_divergence_type": "alpha_divergence", "f_alpha_divergence_coef": 0.7},
    "alpha 1": {"loss_type": ["sigmoid"], "f_divergence_type": "alpha_divergence", "f_alpha_divergence_coef": 1.0},
    "exo_pair in alpha": {"loss_type": ["exo_pair"], "f_divergence_type": "alpha_divergence", "label_smoothing": 0.1},
    "discopop in forward KL": {"loss_type": ["discopop"], "f_divergence_type": "forward_kl"},
}


@pytest.mark.parametrize("name", ["aot", "aot_unpaired"])
def test_sorting_within_a_micro_batch_equals_trl(folder, name):
    """TRL sorts the pairs of one micro-batch; packs that a token budget cuts it into change nothing."""
    options = {"loss_type": [name], "max_steps": 5, "gradient_accumulation_steps": 2, "beta": 1.0}
    reference = str(folder / "reference")
    theirs = run(trl.DPOTrainer, trl.DPOConfig, folder, "theirs", False, **options)
    for budget in (None, 45):
        mine = run(
            DPOTrainer, DPOConfig, folder, "ours", False,
            couple="micro_batch", max_tokens_per_micro_batch=budget, reference_cache_dir=reference, **options,
        )  # fmt: skip
        assert_same_log(mine, theirs, SHARED_METRICS)


@pytest.mark.parametrize("name", BRIEF)
def test_ten_steps_of_every_other_loss_equal_trl(folder, name):
    options = {"loss_type": [name], "max_steps": 10, **BRIEF[name]}
    mine = run(DPOTrainer, DPOConfig, folder, "ours", False, reference_cache_dir=str(folder / "reference"), **options)
    theirs = run(trl.DPOTrainer, trl.DPOConfig, folder, "theirs", False, **options)
    assert_same_log(mine, theirs, SHARED_METRICS)


WHERE_TRL_FAILS = {
    "WPO of sft": {"loss_type": ["sigmoid", "sft"], "use_weighting": True},
    "WPO of hinge": {"loss_type": ["hinge"], "use_weighting": True},
}


@pytest.mark.parametrize("name", WHERE_TRL_FAILS)
def test_weights_that_trl_cannot_put_on_a_loss(folder, name):
    """It multiplies them in place, into an expanded view (sft) or into what the backward of the loss needs (hinge)."""
    options = {"max_steps": 2, **WHERE_TRL_FAILS[name]}
    with pytest.raises(RuntimeError, match="refers to a single memory location|modified by an inplace operation"):
        run(trl.DPOTrainer, trl.DPOConfig, folder, "theirs", False, **options)
    mine = run(DPOTrainer, DPOConfig, folder, "ours", False, reference_cache_dir=str(folder / "reference"), **options)
    assert mine.state.log_history[0]["loss"] > 0


def test_trl_ignores_label_smoothing_where_we_honour_it(folder):
    """At the start all margins are 0 and both losses ln 2; what differs is the gradient, (1 − 2ε) of TRL's."""
    options = {"max_steps": 1, "label_smoothing": 0.2}
    theirs = run(trl.DPOTrainer, trl.DPOConfig, folder, "theirs", False, **options)
    plain = run(trl.DPOTrainer, trl.DPOConfig, folder, "theirs", False, max_steps=1)
    mine = run(DPOTrainer, DPOConfig, folder, "ours", False, reference_cache_dir=str(folder / "reference"), **options)
    norms = [trainer.state.log_history[0]["grad_norm"] for trainer in (theirs, plain, mine)]
    assert norms[0] == norms[1]
    assert norms[2] == pytest.approx(0.6 * norms[0], rel=1e-4)


def test_mixture_of_experts_equals_trl_with_its_load_balancing_loss(folder):
    options = {"reference_cache_dir": str(folder / "reference")}
    mine = run(DPOTrainer, DPOConfig, folder / "moe", "ours", False, **options)
    theirs = run(trl.DPOTrainer, trl.DPOConfig, folder / "moe", "theirs", False)
    assert_same_log(mine, theirs, [*SHARED_METRICS, "aux_loss"])


def test_tokens_are_counted_once_a_prompt(folder, ours):
    """`num_tokens` is what the model ran on: TRL's count less the second copy of every prompt."""
    theirs = run(trl.DPOTrainer, trl.DPOConfig, folder, "theirs", False)
    mine = ours("sigmoid", False)
    (our_log,), (their_log,) = (
        [row for row in trainer.state.log_history if "loss" in row][-1:] for trainer in (mine, theirs)
    )
    lengths = [len(ids) for ids in mine.train_dataset["prompt_ids"]]
    assert their_log["num_tokens"] - our_log["num_tokens"] == 2 * sum(lengths), "40 rows, 20 steps of 4: two epochs"
