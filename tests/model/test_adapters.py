"""Every kind of adapter: the steps of a plain loop, and the given model as the reference, before training and after.

The plain loop has no packed batches: it takes log-probs from `model(input_ids=one sequence).logits`, and those of the
reference from a copy of the model as it was given.
"""

from __future__ import annotations

import copy
import math

import pytest
import torch
from packaging import version
from transformers import set_seed

from dpo_fast.batches.groups import PreferenceGroup
from dpo_fast.batches.packing import pack
from dpo_fast.model.agreement import settle_forward
from families import tiny_model
from preferences import logged, make_trainer, pairs

peft = pytest.importorskip("peft")

STEPS = {"max_steps": 3, "per_device_train_batch_size": 4, "lr_scheduler_type": "constant", "learning_rate": 1e-2}
NOT_OF_METRICS = ("runtime", "per_second")
BETA = 0.1

# Options that tiny layers need; all others are PEFT's own.
TUNERS = {
    "ADALORA": {"total_step": 10, "init_r": 4, "target_r": 2},
    "BEFT": {},
    "BOFT": {"boft_block_size": 4, "boft_block_num": 0},
    "C3A": {"block_size": 8},
    "DEFT": {},
    "DELORA": {},
    "FOURIERFT": {"n_frequency": 50},
    "FROD": {},
    "GLORA": {},
    "GRALORA": {"r": 8, "gralora_k": 2},
    "HIRA": {"r": 4},
    "HRA": {},
    "IA3": {"feedforward_modules": []},
    "LILY": {},
    "LN_TUNING": {"target_modules": ["input_layernorm"]},
    "LOHA": {},
    "LOKR": {},
    "MISS": {"r": 8},
    "OFT": {},
    "OSF": {},
    "PEANUT": {},
    "PSOFT": {"r": 4},
    "PVERA": {},
    "RANDLORA": {},
    "ROAD": {"group_size": 8},
    "SHADOW": {"target_modules": None, "shadow_dropout": 0.0},
    "SHIRA": {"r": 4},
    "SUPERTUNING": {},
    "TINYLORA": {},
    "TRAINABLE_TOKENS": {"token_indices": [5, 6, 7, 8, 9], "target_modules": None},
    "UNILORA": {},
    "VBLORA": {"vector_length": 8, "num_vectors": 16},
    "VERA": {},
    "WAVEFT": {"n_frequency": 50},
}
OLD_PEFT = version.parse(peft.__version__) < version.parse("0.20")
INITIALISATIONS = (True, False, "gaussian", "eva", "olora", "pissa", "pissa_niter_4", "orthogonal", "mica")
OPTIONS = {
    "bias": {"bias": "all"},
    "bias of its layers": {"bias": "lora_only"},
    "rank-stabilised": {"use_rslora": True},
    "dora": {"use_dora": True},
    "head": {"modules_to_save": ["lm_head"]},
    "embeddings": {"modules_to_save": ["embed_tokens"]},
    "head and embeddings": {"modules_to_save": ["lm_head", "embed_tokens"]},
    "norms": {"modules_to_save": ["input_layernorm"]},
    "adapter on the head": {"target_modules": ["q_proj", "lm_head"]},
    "adapter on the embeddings": {"target_modules": ["q_proj", "embed_tokens"]},
    "tokens": {"trainable_token_indices": [5, 6, 7, 8, 9]},
    "tokens of tied weights": {"trainable_token_indices": [5, 6, 7, 8, 9], "tied": True},
    "tied weights": {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True, "tied": True},
    "tied weights, by the head": {"modules_to_save": ["lm_head"], "ensure_weight_tying": True, "tied": True},
    "pissa and bias": {"init_lora_weights": "pissa", "bias": "all"},
}


def given_model(tied: bool = False, bias: bool = True):
    """A model with biases in its attention, so that there is something for `bias` to train."""
    return tiny_model("llama", num_hidden_layers=2, attention_bias=bias, tie_word_embeddings=tied)


def lora(**options):
    return peft.LoraConfig(**{"r": 4, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM", **options})


CASES = {
    "ADAPTION_PROMPT": ("ADAPTION_PROMPT", {"adapter_len": 4, "adapter_layers": 1, "target_modules": None}),
    "POLY": ("POLY", {"n_tasks": 2, "n_skills": 2}),
    "LoRA, invocation tokens": ("LORA", {"alora_invocation_tokens": [5, 6]}),
    **{name: (name, options) for name, options in TUNERS.items()},
    **{f"LoRA, {init}": ("LORA", {"r": 4, "init_lora_weights": init}) for init in INITIALISATIONS},
    **{f"LoRA, {name}": ("LORA", {"r": 4, **options}) for name, options in OPTIONS.items()},
}
QUICK = {"ADALORA", "C3A", "IA3", "OFT", "OSF", "SHADOW", "TRAINABLE_TOKENS", "VERA"}
# Adapters that begin away from the model that they are put on.
AWAY_FROM_THE_MODEL = {"C3A", "FOURIERFT", "LoRA, False"}
# Adapters that mix the tokens of a row, or draw random numbers.
REFUSED = {
    "LILY": "gradient of .*lily_B.* away from the model's own",
    "PVERA": "gradient of .*pvera_.* away from the model's own",
    "ADAPTION_PROMPT": "cannot be trained on packed batches",
    "POLY": "task_ids",
    "LoRA, invocation tokens": "alora_invocation_tokens",
}


def config_of(case: str):
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING as configs

    tuner, options = CASES[case]
    options = {"task_type": "CAUSAL_LM", "target_modules": ["q_proj", "v_proj"], **options}
    options.pop("tied", None)
    return configs[peft.PeftType(tuner)](**options)


def sums(model, rows) -> torch.Tensor:
    """Log-probs of all completions, each run alone."""
    found = []
    for row in rows:
        for completion in row["completion_ids"]:
            ids = torch.tensor([[*row["prompt_ids"], *completion]])
            logits = model(input_ids=ids, use_cache=False).logits[0, len(row["prompt_ids"]) - 1 : -1]
            found.append(logits.log_softmax(-1).gather(1, torch.tensor(completion)[:, None]).sum())
    return torch.stack(found)


def plain_steps(case: str, rows) -> tuple[list[float], list[float]]:
    """Losses and gradient norms of three steps of DPO as the paper has it."""
    given = given_model(CASES[case][1].get("tied", False))
    reference = copy.deepcopy(given)
    set_seed(42)
    model = peft.get_peft_model(given, config_of(case)).train()
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=STEPS["learning_rate"], weight_decay=0.0)
    losses, norms = [], []
    with torch.no_grad():
        ref_logps = sums(reference, rows)
    for _ in range(STEPS["max_steps"]):
        ratios = (sums(model, rows) - ref_logps).view(-1, 2)
        loss = -torch.nn.functional.logsigmoid(BETA * (ratios[:, 0] - ratios[:, 1])).mean()
        optimizer.zero_grad()
        loss.backward()
        norms.append(torch.nn.utils.clip_grad_norm_(weights, 1.0).item())
        optimizer.step()
        losses.append(loss.item())
    return losses, norms


def evaluated(trainer, rows=None) -> dict[str, float]:
    return {k: v for k, v in trainer.evaluate(rows).items() if not k.endswith(NOT_OF_METRICS) and k != "epoch"}


def stored(folder) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_dir()}


@pytest.mark.parametrize(
    "case",
    [
        pytest.param(case, marks=pytest.mark.slow if case in TUNERS and case not in QUICK else ())
        for case in CASES
        if case not in REFUSED and not (OLD_PEFT and case in ("SHADOW", "LoRA, mica"))
    ],
)
def test_steps_and_references_are_those_of_a_plain_loop(tmp_path, case):
    tied = CASES[case][1].get("tied", False)
    rows, held_out = pairs(4), pairs(6, seed=3)
    options = {**STEPS, "beta": BETA, "peft_config": config_of(case)}
    trainer = make_trainer(tmp_path / "a", rows, model=given_model(tied), eval_dataset=held_out, **options)
    losses, norms = plain_steps(case, trainer.train_dataset)
    trainer.train()
    assert logged(trainer, "loss") == pytest.approx(losses, abs=2e-5)
    assert logged(trainer, "grad_norm") == pytest.approx(norms, rel=2e-3, abs=1e-5)
    if case not in AWAY_FROM_THE_MODEL:
        assert losses[0] == pytest.approx(math.log(2), abs=1e-4), "adapters begin at the given model"

    later = make_trainer(tmp_path / "b", rows, model=given_model(tied), **options)
    later.train()
    before = stored(tmp_path / "b" / "reference")
    assert evaluated(later, held_out) == pytest.approx(evaluated(trainer), abs=1e-5)
    assert stored(tmp_path / "b" / "reference") == before, "no store of a trained model"


@pytest.mark.parametrize("case", REFUSED)
def test_what_a_packed_batch_would_change_is_refused(tmp_path, case):
    with pytest.raises(ValueError, match=REFUSED[case]):
        make_trainer(tmp_path, pairs(4), model=given_model(), peft_config=config_of(case), **STEPS)
    assert not list((tmp_path / "reference").glob("*/part-*")), "nothing was computed"


def test_an_adapter_that_changes_the_model_needs_a_reference_of_its_own(tmp_path, monkeypatch):
    """LoftQ, for one, rounds the weights and puts into the adapter what it can of the rest."""
    layer = peft.tuners.lora.layer.LoraLayer
    original = layer.reset_lora_parameters

    def rounding(self, *args):
        weight = self.get_base_layer().weight
        weight.data = (weight.data * 4).round() / 4
        original(self, *args)

    monkeypatch.setattr(layer, "reset_lora_parameters", rounding)
    options = {"peft_config": lora(), **STEPS}
    with pytest.raises(ValueError, match="given one neither with the adapter nor without it.*ref_model="):
        make_trainer(tmp_path, pairs(4), model=given_model(), **options)
    trainer = make_trainer(tmp_path, pairs(4), model=given_model(), ref_model=given_model(), **options)
    trainer.train()
    assert logged(trainer, "loss")[0] != pytest.approx(math.log(2), abs=1e-3), "the policy is another model"


def test_frozen_weights_stay_frozen(tmp_path):
    model = peft.get_peft_model(given_model(), lora(init_lora_weights=False))
    frozen = {name: weight.clone() for name, weight in model.named_parameters() if "lora_A" in name}
    for name, weight in model.named_parameters():
        weight.requires_grad_("lora_B" in name)
    make_trainer(tmp_path, pairs(4), model=model, **STEPS).train()
    assert all(torch.equal(dict(model.named_parameters())[name], weight) for name, weight in frozen.items())


def test_an_adapter_that_was_given_is_its_own_reference_after_training_too(tmp_path):
    given = peft.get_peft_model(given_model(), lora(init_lora_weights=False))
    held_out = pairs(6, seed=3)
    first = make_trainer(tmp_path / "a", pairs(4), model=copy.deepcopy(given), eval_dataset=held_out, **STEPS)
    later = make_trainer(tmp_path / "b", pairs(4), model=copy.deepcopy(given), **STEPS)
    first.train()
    later.train()
    assert evaluated(later, held_out) == pytest.approx(evaluated(first), abs=1e-5)


def test_nothing_that_trains_is_refused(tmp_path):
    with pytest.raises(ValueError, match="model: no weight of it trains"):
        make_trainer(tmp_path, model=given_model().requires_grad_(False))


def test_sparse_gradients_are_refused(tmp_path):
    model = given_model()
    model.model.embed_tokens.sparse = True
    with pytest.raises(ValueError, match=r"model: model.embed_tokens \(Embedding\) has sparse=True"):
        make_trainer(tmp_path, model=model)


@pytest.mark.parametrize("options", [{}, {"modules_to_save": ["lm_head"]}])
def test_a_deep_copy_runs_its_own_weights(options):
    model = peft.get_peft_model(given_model(), lora(init_lora_weights=False, **options))
    settle_forward(model, "auto")
    packed = pack([PreferenceGroup([5, 6, 7], [[8, 9], [10]])])
    before, twin = model(packed=packed).logps, copy.deepcopy(model)
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(1.5)
    assert torch.equal(twin(packed=packed).logps, before)
    assert not torch.allclose(model(packed=packed).logps, before)


@pytest.mark.parametrize("options", OPTIONS)
def test_a_trained_adapter_says_the_same_after_saving(tmp_path, options):
    options = dict(OPTIONS[options])
    tied = options.pop("tied", False)
    if OLD_PEFT and options.get("bias") == "lora_only":
        pytest.skip("this PEFT does not save the biases of layers")
    if options.get("init_lora_weights") == "pissa":
        pytest.skip("PEFT saves what is left to the base: its own guide asks for a conversion")
    trainer = make_trainer(tmp_path, pairs(4), model=given_model(tied), peft_config=lora(**options), **STEPS)
    trainer.train()
    trainer.save_model()
    loaded = peft.PeftModel.from_pretrained(given_model(tied), trainer.args.output_dir).eval()
    ids = torch.tensor([[5, 6, 7, 8, 20, 30]])
    assert torch.allclose(loaded(input_ids=ids).logits, trainer.model.eval()(input_ids=ids).logits, atol=1e-5)
