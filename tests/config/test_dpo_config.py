"""DPOConfig keeps TRL's names and defaults, and refuses what cannot work with a message that says what to do."""

import dataclasses
import json
import warnings

import pytest
import torch
from transformers import HfArgumentParser, TrainingArguments

from dpo_fast.commands.arguments import TRL_ONLY
from dpo_fast.config import DPOConfig
from dpo_fast.losses import LOSSES, SMOOTHED

DIFFERENT_FROM_TRL = {
    "gradient_checkpointing": None,  # where it is needed
    "logging_nan_inf_filter": False,  # its check waits for the device in every step
}


def make(tmp_path, **options):
    return DPOConfig(output_dir=str(tmp_path), report_to="none", **options)


def default(field):
    return field.default_factory() if field.default is dataclasses.MISSING else field.default


def test_every_trl_field_is_here_with_its_default_or_is_known_not_to_be():
    trl = pytest.importorskip("trl")
    ours = {field.name: default(field) for field in dataclasses.fields(DPOConfig)}
    for field in dataclasses.fields(trl.DPOConfig):
        if field.name in TRL_ONLY:
            assert field.name not in ours and TRL_ONLY[field.name] == default(field), field.name
        else:
            assert ours[field.name] == DIFFERENT_FROM_TRL.get(field.name, default(field)), field.name


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"loss_type": "sigmod"}, "loss_type='sigmod' is not known; choose from .*'sigmoid'"),
        ({"loss_type": ["sigmoid", "nope"]}, "loss_type='nope'"),
        ({"loss_type": []}, "at least one loss"),
        ({"loss_weights": [1.0, 2.0]}, r"loss_weights=\[1.0, 2.0\] must list one weight for each of the 1 loss"),
        ({"loss_weights": 1.0}, "loss_weights=1.0 must be a list, each a finite number"),
        ({"loss_weights": [float("nan")]}, "finite"),
        ({"loss_type": ["aot"], "use_weighting": True}, "use_weighting=True does not go with"),
        ({"couple": "batch"}, "couple='batch'.*'micro_batch'"),
        ({"rpo_alpha": -1.0}, "rpo_alpha=-1.0 must be a finite number"),
        ({"max_length": 1}, "max_length=1 must be an integer of at least 2"),
        ({"max_length": 12.5}, "max_length=12.5"),
        ({"truncation_mode": "middle"}, "truncation_mode='middle'.*'keep_start', 'keep_end'"),
        ({"layout": "packed"}, "layout='packed'.*'auto', 'shared', 'padded'"),
        ({"max_tokens_per_micro_batch": 0}, "max_tokens_per_micro_batch=0 must be an integer of at least 1"),
        ({"precompute_ref_batch_size": -1}, "precompute_ref_batch_size=-1"),
        ({"dataset_num_proc": 0}, "dataset_num_proc=0"),
        ({"pad_to_multiple_of": "many"}, "pad_to_multiple_of='many'"),
        ({"pad_to_multiple_of": 0}, "pad_to_multiple_of=0"),
        ({"model_init_kwargs": "revision"}, "model_init_kwargs='revision' is not a mapping"),
    ],
)
def test_refuses_what_cannot_work(tmp_path, options, words):
    with pytest.raises(ValueError, match=words):
        make(tmp_path, **options)


@pytest.mark.parametrize("name", sorted(LOSSES))
def test_accepts_every_loss_that_exists_as_text_too(tmp_path, name):
    assert make(tmp_path, loss_type=name, label_smoothing=0.1 * (name in SMOOTHED)).loss_type == [name]


def test_bounds_themselves_are_allowed(tmp_path):
    config = make(
        tmp_path,
        max_length=2,
        label_smoothing=0,
        max_tokens_per_micro_batch=1,
        loss_type=["sigmoid", "sft"],
        loss_weights=[0, -1],
    )
    assert (config.max_length, config.loss_weights) == (2, [0, -1])
    assert make(tmp_path, max_length=None).max_length is None


@pytest.mark.parametrize(("given", "kept"), [("auto", None), (None, None), ("none", None), ("64", 64), (8, 8)])
def test_pad_to_multiple_of_reads_text_from_the_command_line(tmp_path, given, kept):
    assert make(tmp_path, pad_to_multiple_of=given).pad_to_multiple_of == kept


@pytest.mark.parametrize(
    ("gpu", "options", "expected"),
    [
        (True, {}, True),
        (True, {"fp16": True}, False),
        (True, {"use_cpu": True}, False),
        (True, {"bf16": False}, False),
        (False, {}, False),
    ],
)
def test_bf16_is_on_by_default_only_on_a_gpu_that_has_it(tmp_path, monkeypatch, gpu, options, expected):
    seen, post_init = [], TrainingArguments.__post_init__

    def note(self) -> None:
        seen.append(self.bf16)
        self.bf16 = self.fp16 = False  # whether this machine could run it is not the question here
        post_init(self)

    monkeypatch.setattr("dpo_fast.config.dpo_config._gpu_supports_bf16", lambda: gpu)
    monkeypatch.setattr(TrainingArguments, "__post_init__", note)
    make(tmp_path, **options)
    assert seen == [expected]


@pytest.mark.parametrize("strategy", ["group_by_length", "batch_rebalance"])
def test_an_order_by_length_is_refused(tmp_path, strategy):
    with pytest.raises(ValueError, match=f"train_sampling_strategy='{strategy}' saves padding"):
        make(tmp_path, train_sampling_strategy=strategy)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, ("auto", False)),
        ({"torch_compile_mode": "default"}, ("compile", True)),
        ({"torch_compile": True, "layer_kernels": "compile"}, ("compile", True)),
        ({"layer_kernels": "compile"}, ("compile", True)),
        ({"layer_kernels": "none"}, ("none", False)),
        ({"layer_kernels": "liger"}, ("liger", False)),
        ({"use_liger_kernel": True, "liger_kernel_config": {"fused_linear_cross_entropy": False}}, ("liger", False)),
    ],
)
def test_what_fuses_the_layers_can_be_said_in_the_words_of_transformers_too(tmp_path, monkeypatch, options, expected):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name == "liger_kernel")
    monkeypatch.delenv("ACCELERATE_DYNAMO_BACKEND", raising=False)
    config = make(tmp_path, **options)
    assert (config.layer_kernels, config.torch_compile) == expected
    assert not config.use_liger_kernel, "with which transformers puts Liger's forward in the packed one's place"
    again = make(tmp_path, **{name: getattr(config, name) for name in ("layer_kernels", "torch_compile")})
    assert (again.layer_kernels, again.torch_compile) == expected


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"layer_kernels": "fast"}, "layer_kernels='fast' must be one of .*'liger'"),
        ({"torch_compile": True, "layer_kernels": "none"}, "torch_compile=True asks for .*'compile', .*'none'"),
        ({"use_liger_kernel": True, "torch_compile": True}, "torch_compile=True asks for .*'compile', .*'liger'; keep"),
        ({"use_liger_kernel": True, "layer_kernels": "compile"}, "use_liger_kernel=True asks for .*'liger'"),
        (
            {"layer_kernels": "liger", "liger_kernel_config": {"fused_linear_cross_entropy": True}},
            r"turns \['fused_linear_cross_entropy'\] on, .* leave it out",
        ),
    ],
)
def test_two_things_that_would_fuse_the_layers_are_refused(tmp_path, monkeypatch, options, message):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name == "liger_kernel")
    with pytest.raises(ValueError, match=message):
        make(tmp_path, **options)


def test_liger_that_is_not_installed_is_refused_with_the_cure(tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match="not installed: pip install liger-kernel, or take 'none' or 'compile'"):
        make(tmp_path, use_liger_kernel=True)


@pytest.mark.parametrize(
    ("device", "options", "expected"),
    [("cuda", {}, True), ("cuda", {"dataloader_pin_memory": False}, False), ("cpu", {}, False)],
)
def test_batches_are_pinned_and_copied_while_the_host_goes_on(monkeypatch, tmp_path, device, options, expected):
    find = TrainingArguments.device.fget  # it also finds the other processes
    monkeypatch.setattr(TrainingArguments, "device", property(lambda config: find(config) and torch.device(device)))
    config = make(tmp_path, **options)
    assert config.dataloader_pin_memory is config.accelerator_config.non_blocking is expected


def test_bf16_asks_for_support_in_hardware(monkeypatch):
    from dpo_fast.config.dpo_config import _gpu_supports_bf16

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: including_emulation)
    assert not _gpu_supports_bf16()


def test_cpu_trains_in_fp32_unless_told(tmp_path):
    assert make(tmp_path, use_cpu=True).bf16 is False
    assert make(tmp_path, use_cpu=True, bf16=True).bf16 is True


@pytest.mark.parametrize("wanted", [True, False])
def test_gradient_checkpointing_reaches_its_new_name_without_a_warning(tmp_path, wanted):
    with warnings.catch_warnings():
        warnings.simplefilter("error", FutureWarning)
        config = make(tmp_path, gradient_checkpointing=wanted)
    assert config.gradient_checkpointing is wanted
    if hasattr(config, "activation_checkpointing"):  # since transformers 5.2x
        assert config.activation_checkpointing is wanted
        assert make(tmp_path, activation_checkpointing=not wanted).gradient_checkpointing is not wanted


def test_columns_are_never_removed(tmp_path):
    assert make(tmp_path, remove_unused_columns=True).remove_unused_columns is False


def test_survives_the_ways_in_which_trainer_copies_it(tmp_path):
    config = make(tmp_path, model_init_kwargs='{"revision": "v1"}', loss_type="ipo", beta=0.3, max_length=77)
    assert config.model_init_kwargs == {"revision": "v1"}
    written = json.loads(config.to_json_string())
    assert (written["loss_type"], written["beta"], written["max_length"]) == (["ipo"], 0.3, 77)
    again = dataclasses.replace(config, beta=0.4)
    assert (again.beta, again.loss_type, again.bf16) == (0.4, ["ipo"], config.bf16)


def test_every_own_field_explains_itself():
    text = HfArgumentParser(DPOConfig).format_help()  # raises when a help text has a bare percent sign
    own = set(DPOConfig.__annotations__)
    assert {"layout", "max_tokens_per_micro_batch", "group_by_prompt", "reference_cache_dir"} <= own
    for field in dataclasses.fields(DPOConfig):
        if field.name in own:
            assert f"--{field.name}" in text and field.metadata["help"], field.name
    for name in ("padding_free", "precompute_ref_log_probs", "remove_unused_columns"):
        assert "without effect" in DPOConfig.__dataclass_fields__[name].metadata["help"]


@pytest.mark.parametrize(
    ("options", "tokens"),
    [
        ({}, 2048),
        ({"max_tokens_per_micro_batch": 700}, 700),
        ({"loss_type": ["sigmoid", "aot"], "loss_weights": [1.0, 0.5]}, None),  # several packs cost another pass
    ],
)
def test_packs_are_bounded_on_a_cpu(tmp_path, options, tokens):
    assert make(tmp_path, use_cpu=True, **options).max_tokens_per_micro_batch == tokens
