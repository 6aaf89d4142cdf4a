"""A run has finite weights and honest logs, or it ends with `TrainingDiverged` and saves nothing that is not finite."""

from __future__ import annotations

import math
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from safetensors.torch import load_file
from test_distributed import USE_CPU, engine_environment, launch, leave, shard_on_cpus
from torch import nn
from transformers import TrainerCallback

from dpo_fast import cli
from dpo_fast.commands.launch import LAUNCHED_MARKS
from dpo_fast.errors import InputError, TrainingDiverged
from dpo_fast.losses import LOSSES
from dpo_fast.training.checkpoint_seal import SEAL_FILE
from dpo_fast.training.resuming import RECORD_FILE
from dpo_fast.training.running_margin import RunningMargin
from families import tiny_model, tiny_tokenizer
from preferences import logged, make_trainer, pairs


def tiny(seed: int = 0, **options) -> nn.Module:
    sizes = {"num_hidden_layers": 1, "hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2}
    return tiny_model("llama", seed=seed, **{**sizes, "num_key_value_heads": 1, **options})


def with_column(name: str, value: float):
    rows = pairs(8)
    return rows.add_column(name, [value] * len(rows))


def scored(*scores: float) -> dict:
    rows = [{"prompt": "w3 w4", "completions": [" w5 w6", " w7", " w8 w9 w10"], "scores": list(scores)}] * 8
    return {"dataset": Dataset.from_list(rows)}


FP16, BF16 = {"model": {"dtype": torch.float16}}, {"model": {"dtype": torch.bfloat16}}
QUICK = {
    "rate 1e30": {"learning_rate": 1e30},
    "rate 1e38": {"learning_rate": 1e38},
    "rate 1e30, unclipped": {"learning_rate": 1e30, "max_grad_norm": 0.0},
    "beta 1e6, sppo_hard, forward KL": {"beta": 1e6, "loss_type": ["sppo_hard"], "f_divergence_type": "forward_kl"},
    "weight decay 1e3": {"weight_decay": 1e3, "learning_rate": 1.0},
    "adam_epsilon 0": {"adam_epsilon": 0.0},
    "sgd, rate 1e30": {"optim": "sgd", "learning_rate": 1e30},
    "offsets 1e30": {"dataset": with_column("offset", 1e30)},
    "fp16 weights, rate 1": {**FP16, "learning_rate": 1.0},
    "beta_dpo, rate 10": {"loss_type": ["beta_dpo"], "beta_dpo_alpha": 1e6, "learning_rate": 10.0},
}
SLOW = {
    "rpo_alpha 1e6, rate 10": {"rpo_alpha": 1e6, "learning_rate": 10.0},
    "neftune 1e6": {"neftune_noise_alpha": 1e6},
    "beta 1e6, rate 10": {"beta": 1e6, "learning_rate": 10.0},
    "beta 1e-6, ipo": {"beta": 1e-6, "loss_type": ["ipo"]},
    "rate 1e3": {"learning_rate": 1e3},
    "rate 1": {"learning_rate": 1.0},
    **{f"beta {beta:g}": {"beta": beta} for beta in (1e-6, 1e3, 1e6)},
    **{
        f"{name}, rate 10": {
            "loss_type": [name],
            "learning_rate": 10.0,
            "label_smoothing": 1e-3 if name == "exo_pair" else 0.0,
        }
        for name in LOSSES
        if name != "beta_dpo"
    },
    "bf16 weights, rate 10": {**BF16, "learning_rate": 10.0},
    "bf16 autocast, rate 10": {"bf16": True, "learning_rate": 10.0},
    "fp16 weights, beta 1e6": {**FP16, "beta": 1e6},
    "clipped to 1e-9": {"max_grad_norm": 1e-9, "learning_rate": 10.0},
    "adam_beta1 0": {"adam_beta1": 0.0, "learning_rate": 10.0},
    "adam_beta2 0": {"adam_beta2": 0.0, "learning_rate": 10.0},
    "adam_beta2 0.999999": {"adam_beta2": 0.999999, "learning_rate": 10.0},
    "adam_epsilon 1e-30": {"adam_epsilon": 1e-30, "learning_rate": 1.0},
    "rmsprop, rate 10": {"optim": "rmsprop", "learning_rate": 10.0},
    "adafactor, rate 10": {"optim": "adafactor", "learning_rate": 10.0},
    "label smoothing 0.49": {"label_smoothing": 0.49, "learning_rate": 10.0},
    "ld_alpha 0": {"ld_alpha": 0.0, "learning_rate": 10.0},
    "offsets -1e30": {"dataset": with_column("offset", -1e30), "learning_rate": 1.0},
    "row weights 1e30": {"dataset": with_column("weight", 1e30)},
    "scores 1e30": scored(1e30, -1e30, 0.0),
    "noise and forward KL": {"neftune_noise_alpha": 1e6, "f_divergence_type": "forward_kl"},
    "alpha divergence of 40": {"f_divergence_type": "alpha_divergence", "f_alpha_divergence_coef": 40.0},
}
SETTINGS = {**QUICK, **SLOW}


def finite(weights: dict[str, torch.Tensor]) -> bool:
    return all(weight.isfinite().all() for weight in weights.values())


@pytest.mark.parametrize(
    "setting", [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in SETTINGS]
)
def test_extreme_settings(tmp_path, setting):
    """Weights on disk are finite; where the run did not diverge, those in memory are, and the log shows bad losses."""
    options = {"dataset": pairs(8), "warmup_steps": 0, "max_steps": 4, **SETTINGS[setting]}
    options |= {"model": tiny(**options.pop("model", {})), "logging_steps": 2, "save_strategy": "steps"}
    trainer = make_trainer(tmp_path, save_steps=1, **options)
    losses, step_of = [], trainer.training_step

    def kept(*arguments, **keywords):
        losses.append(step_of(*arguments, **keywords).item())
        return torch.tensor(losses[-1])

    trainer.training_step = kept
    saved = tmp_path / "model"
    try:
        trainer.train()
        trainer.save_model(str(saved))
    except TrainingDiverged as error:
        _is_told(error, tmp_path / "out")
        assert not saved.exists()
    else:
        assert finite(trainer.model.state_dict()) and finite(load_file(saved / "model.safetensors"))
        for shown, window in zip(logged(trainer, "loss"), (losses[:2], losses[2:4]), strict=True):
            assert math.isfinite(shown) == all(map(math.isfinite, window)), (shown, window)
    for file in (tmp_path / "out").glob("*/model.safetensors"):
        assert finite(load_file(file)), file


def _is_told(error: TrainingDiverged, output: Path) -> None:
    message = str(error)
    assert "\n" not in message and re.search(rf"step {error.step}\b", message) and "Likely cause: " in message
    assert error.first in ("loss", "gradient norm", "weights") and 1 <= error.step <= 4
    good = [int(folder.name.split("-")[1]) for folder in output.glob("checkpoint-*")]
    assert error.checkpoint == (str(output / f"checkpoint-{max(good)}") if good else None)
    assert f"Last good checkpoint: {error.checkpoint or 'none'}." in message


class Harm(TrainerCallback):
    """Overwrites a weight after a step."""

    def __init__(self, step: int, value: float = math.nan, name: str = "lm_head"):
        self.step, self.value, self.name = step, value, name

    @torch.no_grad()
    def on_optimizer_step(self, args, state, control, model=None, **kwargs):
        if state.global_step == self.step - 1:
            for name, weight in model.named_parameters():
                if self.name in name and weight.requires_grad:
                    part = getattr(weight, "ds_tensor", weight)  # of ZeRO-3
                    getattr(part, "to_local", lambda part=part: part)().view(-1)[:1] = self.value


def steps_with(trainer, bad: dict[int, float]) -> None:
    """Let the loss of some steps be another number; gradients stay as they are."""
    inner = trainer.compute_loss

    def compute_loss(*args, **kwargs):
        value = inner(*args, **kwargs)
        number = bad.get(trainer.state.global_step + 1) if trainer.model.training else None
        return value if number is None else value + (number - value.detach())

    trainer.compute_loss = compute_loss


def test_one_bad_loss_shows_in_its_window_alone(tmp_path):
    plain, spoilt = (
        make_trainer(tmp_path, model=tiny(), max_steps=8, logging_steps=2, learning_rate=1e-4) for _ in range(2)
    )
    plain.train()
    steps_with(spoilt, {3: math.inf})
    spoilt.train()
    expected, found = logged(plain, "loss"), logged(spoilt, "loss")
    assert math.isinf(found[1]) and expected[:1] + expected[2:] == found[:1] + found[2:]
    assert logged(plain, "grad_norm") == logged(spoilt, "grad_norm")


@pytest.mark.parametrize(
    ("bad", "first"),
    [((2, 3, 4), 2), ((1, 2, 4, 5, 6), 4), ((5, 6), None), ((1, 3, 5, 7), None)],
)
def test_a_run_ends_with_the_third_bad_loss_in_a_row(tmp_path, bad, first):
    trainer = make_trainer(tmp_path, model=tiny(), max_steps=8, logging_steps=3)
    steps_with(trainer, dict.fromkeys(bad, math.nan) | {bad[0]: -math.inf})
    if first is None:
        trainer.train()
        return
    with pytest.raises(
        TrainingDiverged, match=f"the loss of step {first} is not finite, and neither is that of the steps"
    ) as caught:
        trainer.train()
    assert (caught.value.first, caught.value.step, caught.value.checkpoint) == ("loss", first, None)
    assert math.isnan(logged(trainer, "loss")[-1]), "the log says so before the run ends"


def test_a_short_run_without_a_finite_loss_is_none(tmp_path):
    trainer = make_trainer(tmp_path, model=tiny(), max_steps=1, logging_strategy="no")
    steps_with(trainer, {1: math.inf})
    with pytest.raises(TrainingDiverged, match="the loss of step 1 is not finite"):
        trainer.train()


def test_skipped_gradients_do_not_end_a_run(tmp_path):
    """Mixed precision's scaler skips steps whose gradient is infinite; the weights stay as they are."""
    trainer = make_trainer(tmp_path, model=tiny(), dataset=pairs(8), max_steps=40, learning_rate=0.0, logging_steps=40)
    norms = iter([math.inf] * 20 + [1.0] * 20)
    trainer._get_grad_norm = lambda *args, **kwargs: torch.tensor(next(norms))
    trainer.train()
    norms = iter([math.inf] * 40)
    with pytest.raises(TrainingDiverged, match="the gradient norm of step 1 is not finite, and neither is that"):
        trainer.train()


WRITES = {
    "a checkpoint": {"save_strategy": "steps", "save_steps": 2},
    "an evaluation": {"eval_strategy": "steps", "eval_steps": 2, "eval_dataset": pairs(4)},
    "the end": {},
}


@pytest.mark.parametrize("write", WRITES)
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_weights_are_looked_at_before_they_are_used(tmp_path, write, value):
    """Of a token that no row has, so that no loss shows it."""
    trainer = make_trainer(tmp_path, model=tiny(), max_steps=4, logging_strategy="no", **WRITES[write])
    trainer.add_callback(Harm(4, value, "embed_tokens"))
    with pytest.raises(TrainingDiverged, match="the weights are not finite after step 4") as caught:
        trainer.train()
    good = str(tmp_path / "out" / "checkpoint-2") if write == "a checkpoint" else None
    assert caught.value.checkpoint == good and not (tmp_path / "out" / "checkpoint-4").exists()
    with pytest.raises(TrainingDiverged, match="the weights are not finite"):
        trainer.save_model(str(tmp_path / "model"))
    assert not (tmp_path / "model").exists()


def test_a_run_goes_on_from_the_last_good_checkpoint(tmp_path):
    options = {"max_steps": 6, "save_strategy": "steps", "save_steps": 2, "logging_steps": 2}
    whole = make_trainer(tmp_path / "whole", model=tiny(), **options)
    whole.train()
    trainer = make_trainer(tmp_path, model=tiny(), **options)
    harm = Harm(3)
    trainer.add_callback(harm)
    with pytest.raises(
        TrainingDiverged, match="the loss of step 4 is not finite, and neither are the weights"
    ) as caught:
        trainer.train()
    assert caught.value.checkpoint == str(tmp_path / "out" / "checkpoint-2")
    trainer.remove_callback(harm)
    trainer.train(resume_from_checkpoint=True)
    for one, other in zip(whole.model.parameters(), trainer.model.parameters(), strict=True):
        assert torch.equal(one, other)


def test_weights_that_are_not_finite_to_begin_with_are_refused(tmp_path):
    model = tiny()
    with torch.no_grad():
        model.lm_head.weight[50] = math.nan
    with pytest.raises(InputError, match="^model: lm_head.weight holds NaN or inf before the first step"):
        make_trainer(tmp_path, model=model)
    trainer = make_trainer(tmp_path, model=tiny(), save_strategy="steps", save_steps=1, max_steps=2)
    trainer.train()
    checkpoint = tmp_path / "out" / "checkpoint-1"
    model.save_pretrained(checkpoint)
    for name in (SEAL_FILE, RECORD_FILE):  # as an earlier release has left it
        (checkpoint / name).unlink()
    with pytest.raises(InputError, match="^resume_from_checkpoint='.*checkpoint-1' holds weights that are not finite"):
        trainer.train(resume_from_checkpoint=str(checkpoint))


def test_an_adapter_is_looked_at(tmp_path):
    from peft import LoraConfig

    config = LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
    trainer = make_trainer(tmp_path, model=tiny(), peft_config=config, max_steps=2, save_strategy="steps", save_steps=1)
    trainer.add_callback(Harm(2, math.inf, "lora_A"))
    with pytest.raises(TrainingDiverged, match="the weights are not finite after step 2"):
        trainer.train()
    assert [folder.name for folder in (tmp_path / "out").glob("checkpoint-*")] == ["checkpoint-1"]


def test_a_running_mean_forgets_a_bad_step():
    running = RunningMargin(torch.device("cpu"))
    for share in (1.0, math.inf, math.nan, 2.0):
        running.add(torch.tensor(share))
        running.end_step()
    assert running.mean.item() == pytest.approx(0.9 * 0.1 + 0.2)


@pytest.fixture
def command(tmp_path, monkeypatch) -> list[str]:
    """A run that diverges, as a user starts it, in an empty folder."""
    for mark in LAUNCHED_MARKS:
        monkeypatch.delenv(mark, raising=False)
    monkeypatch.setattr("accelerate.commands.config.config_args.default_config_file", str(tmp_path / "none.yaml"))
    monkeypatch.setenv("DPO_FAST_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    tiny().save_pretrained("model")
    tiny_tokenizer().save_pretrained("model")
    pairs(8).to_json("rows.jsonl")
    flags = (
        "--model model --dataset rows.jsonl --use_cpu --max_length 64 --report_to none --output_dir out --max_steps 4"
    )
    return ["train", *flags.split(), "--learning_rate", "1e30", "--bf16", "false", "--warmup_steps", "0"]


def _says_so(status: int, out: str, err: str) -> None:
    assert status == 1 and "Saved the model" not in out
    (line,) = [line for line in err.splitlines() if line.startswith("dpo-fast: error: ")]
    for words in ("diverged: the loss of step 2", "learning_rate=1e+30", "Last good checkpoint: none."):
        assert words in line
    assert "Traceback" not in err and not list(Path("out").glob("*.safetensors"))


def test_the_command_ends_with_status_1(command, capsys):
    status = cli.main(command)
    _says_so(status, *capsys.readouterr())


@pytest.mark.slow
def test_the_process_ends_with_status_1(command):
    done = subprocess.run([sys.executable, "-P", "-m", "dpo_fast.cli", *command], capture_output=True, text=True)
    _says_so(done.returncode, done.stdout, done.stderr)


def ends_on_a_rank(folder: str, engine: str) -> None:
    """Only the last rank sees what is wrong, and all end."""
    shard_on_cpus()
    options = {"save_strategy": "steps", "save_steps": 2, "max_steps": 4, "use_cpu": USE_CPU, "logging_steps": 2}
    for what in ("loss", "weights"):
        trainer = make_trainer(Path(folder) / what, model=tiny_model("llama"), **options)
        if os.environ["RANK"] == "1" and what == "loss":
            steps_with(trainer, dict.fromkeys((1, 2, 3, 4), math.inf))
        if what == "weights" and (os.environ["RANK"] == "1" or engine == "ddp"):
            trainer.add_callback(Harm(2))
        step, words = (1, "the loss of step 1 is") if what == "loss" else (2, "the weights are not finite after step 2")
        with pytest.raises(TrainingDiverged, match=words) as caught:
            trainer.train()
        assert (caught.value.first, caught.value.step) == (what, step)
        Path(folder, f"{what}-{os.environ['RANK']}").touch()
    leave()


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["ddp", "fsdp2", "zero2", "zero3"])
def test_all_ranks_end_together(tmp_path, engine):
    if engine.startswith("zero"):
        pytest.importorskip("deepspeed")
    launch(2, f"ends_on_a_rank({str(tmp_path)!r}, {engine!r})", "test_divergence", **engine_environment(engine))
    ended = {path.name for path in tmp_path.glob("*-[01]")}
    assert ended == {"loss-0", "loss-1", "weights-0", "weights-1"}
    assert not list(tmp_path.glob("weights/out/checkpoint-*"))
