"""The trainer takes what people have: another trainer's configuration, paths, processors, adapters."""

from __future__ import annotations

import pytest
import torch
from transformers import ProcessorMixin, TrainingArguments

from dpo_fast import DPOConfig, DPOTrainer
from families import tiny_model, tiny_tokenizer
from preferences import assert_same_weights, logged, make_trainer, pairs, trained

OPTIONS = {
    "use_cpu": True,
    "report_to": [],
    "max_steps": 3,
    "per_device_train_batch_size": 4,
    "learning_rate": 1e-3,
    "logging_steps": 1,
    "save_strategy": "no",
    "gradient_checkpointing": False,
    "disable_tqdm": True,
    "bf16": False,
}


def train(tmp_path, args, **more):
    more = {"processing_class": tiny_tokenizer(), **more}
    trainer = DPOTrainer(more.pop("model", None) or tiny_model("llama"), args=args, train_dataset=pairs(), **more)
    trainer.train()
    return trainer


def test_a_configuration_of_trl_trains_the_same(tmp_path, monkeypatch):
    trl = pytest.importorskip("trl")
    monkeypatch.setenv("DPO_FAST_CACHE", str(tmp_path / "cache"))
    special = {"beta": 0.3, "loss_type": ["ipo"], "max_length": 24, "output_dir": str(tmp_path)}
    theirs = train(tmp_path, trl.DPOConfig(**OPTIONS, **special))
    ours = train(tmp_path, DPOConfig(**OPTIONS, **special))
    assert isinstance(theirs.args, DPOConfig) and theirs.args.beta == 0.3 and theirs.args.max_length == 24
    assert logged(theirs, "loss") == logged(ours, "loss")


def test_an_option_of_trl_that_means_nothing_here_is_refused(tmp_path):
    trl = pytest.importorskip("trl")
    with pytest.raises(ValueError, match=r"args: DPOConfig\(sync_ref_model=True\) means nothing"):
        train(tmp_path, trl.DPOConfig(**OPTIONS, output_dir=str(tmp_path), sync_ref_model=True))


def test_transformers_arguments_and_other_things(tmp_path):
    trainer = train(tmp_path, TrainingArguments(**OPTIONS, output_dir=str(tmp_path)))
    assert trainer.args.learning_rate == 1e-3 and trainer.args.beta == 0.1
    with pytest.raises(ValueError, match="args is a dict; give a dpo_fast.DPOConfig"):
        train(tmp_path, {"output_dir": str(tmp_path)})


def test_a_reference_may_be_a_path(tmp_path):
    reference = tiny_model("llama", seed=4)
    reference.save_pretrained(tmp_path / "reference_model")
    loaded = make_trainer(tmp_path, ref_model=reference)
    named = make_trainer(tmp_path, ref_model=str(tmp_path / "reference_model"))
    assert named.train_dataset["ref_logps"][:] == loaded.train_dataset["ref_logps"][:]
    assert named.reference.store.folder == loaded.reference.store.folder, "the same weights have the same store"


def test_a_processor_gives_its_tokenizer(tmp_path):
    class Processor(ProcessorMixin):
        def __init__(self, tokenizer):
            self.tokenizer = tokenizer

    args = DPOConfig(**OPTIONS, output_dir=str(tmp_path), reference_cache_dir=str(tmp_path / "reference"))
    trainer = train(tmp_path, args, processing_class=Processor(tiny_tokenizer()))
    assert trainer.processing_class.vocab_size == tiny_tokenizer().vocab_size
    with pytest.raises(ValueError, match="processing_class is a str"):
        train(tmp_path, args, processing_class="llama")


def test_a_folder_with_an_adapter_trains_that_adapter(tmp_path):
    peft = pytest.importorskip("peft")
    base = tmp_path / "base"
    tiny_model("llama").save_pretrained(base)
    tiny_tokenizer().save_pretrained(base)
    first = make_trainer(tmp_path, model=str(base), peft_config=peft.LoraConfig(target_modules=["q_proj"]), max_steps=4)
    trained(first)
    first.save_model(str(tmp_path / "adapter"))

    model = peft.PeftModel.from_pretrained(tiny_model("llama"), str(tmp_path / "adapter"), is_trainable=True)
    loaded = make_trainer(tmp_path, model=model)
    named = make_trainer(tmp_path, model=str(tmp_path / "adapter"))
    assert named.train_dataset["ref_logps"][:] == loaded.train_dataset["ref_logps"][:], "with the adapter"
    before = {name: p.detach().clone() for name, p in named.model.named_parameters()}
    one, other = trained(loaded), trained(named)
    assert set(other) == {name for name in before if "lora_" in name}, "nothing but the adapter trains"
    assert any(not torch.equal(before[name], other[name]) for name in other)
    assert_same_weights(one, other, 1e-6)
    assert logged(named, "loss")[0] == pytest.approx(0.693147, abs=1e-6)


@pytest.mark.parametrize(
    ("argument", "cure"),
    [
        ({"tokenizer": None}, "tokenizer=None is no argument of DPOTrainer; give processing_class="),
        ({"beta": 0.2}, r"beta=0.2 is no argument of DPOTrainer; give DPOConfig\(beta=…\)"),
        (
            {"max_prompt_length": 64},
            r"max_prompt_length=64 is no argument .* DPOConfig\(max_length=…\)",
        ),
        ({"loss_typ": "ipo"}, "loss_typ='ipo' is no argument of DPOTrainer; leave it out"),
    ],
)
def test_an_argument_of_earlier_trainers_is_told_its_new_place(argument, cure):
    with pytest.raises(ValueError, match=cure):
        DPOTrainer(tiny_model("llama"), train_dataset=pairs(), **argument)
