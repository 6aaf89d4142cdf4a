"""Several processes train what one process trains: the same rows a step, losses, metrics and weights.

The global batch is the contract: n ranks with b groups each take the groups that one process with n·b groups takes.
Rows and completions are of different lengths and numbers, ranks have different numbers of packs, and the last batch of
an epoch leaves ranks without a group.
"""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch
from accelerate import DistributedType, PartialState
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils.launch import prepare_deepspeed_cmd_env, prepare_multi_gpu_env
from datasets import Dataset
from safetensors.torch import load_file, save_file
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import TrainerCallback

from dpo_fast import cli
from dpo_fast import trainer as trainer_module
from dpo_fast.commands import train
from dpo_fast.reference.store.maintenance import export, info
from dpo_fast.trainer import DPOTrainer
from families import tiny_model, tiny_tokenizer
from interpreting import environment
from preferences import make_trainer, pairs, ranked
from repository import ROOT

GROUPS = 8  # of a global batch
USE_CPU = os.environ.get("ACCELERATE_USE_DEEPSPEED") != "true"  # else accelerate takes DDP; DS_ACCELERATOR says it


def rows(count: int, seed: int = 0) -> Dataset:
    """Pairs and groups of three and four completions in turn."""
    both = []
    for pair, group in zip(pairs(count, seed), ranked(count, seed), strict=True):
        both += [{"prompt": pair["prompt"], "completions": [pair["chosen"], pair["rejected"]], "scores": [1, 0]}, group]
    return Dataset.from_list(both[:count])


# 17 groups: the third batch of an epoch is a single group, so that all ranks but one run dry.
RUNS = {
    "groups": {},
    "packs": {"max_tokens_per_micro_batch": 45},
    "accumulated packs": {"max_tokens_per_micro_batch": 60, "gradient_accumulation_steps": 2},
    "adapter": {"lora": True, "optim": "adamw_torch", "learning_rate": 1e-3},
    "checkpointing, adapter": {"lora": True, "gradient_checkpointing": True, "max_tokens_per_micro_batch": 60},
    "coupled": {"loss_type": ["aot", "sigmoid"], "max_tokens_per_micro_batch": 60},
    "moving beta": {"loss_type": ["beta_dpo"]},
    "padded, LD-DPO, weighted": {"layout": "padded", "ld_alpha": 0.5, "use_weighting": True},
    "tokens": {"loss_type": ["sft", "sigmoid"], "loss_weights": [0.3, 1.0]},
}
QUICK = ["groups", "packs", "adapter", "coupled"]


def make(name: str, folder: Path, ranks: int, **more) -> DPOTrainer:
    options = {"optim": "sgd", "learning_rate": 0.05, "max_steps": 10, "use_cpu": USE_CPU, **RUNS[name], **more}
    if options.pop("lora", False):
        from peft import LoraConfig

        options["peft_config"] = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    accumulated = options.get("gradient_accumulation_steps", 1)
    size = GROUPS // ranks // accumulated
    dataset = options.pop("dataset", pairs(17) if options.get("loss_type", [""])[0] == "aot" else rows(17))
    return make_trainer(
        folder,
        dataset,
        model=str(folder.parent.parent / "model"),
        eval_dataset=rows(11, seed=5),
        per_device_train_batch_size=size,
        per_device_eval_batch_size=size,
        **options,
    )


def run(name: str, folder: Path, ranks: int, resume: str | None = None, **more) -> DPOTrainer:
    """Trains and evaluates; leaves logs, predictions and trained weights in `folder`."""
    trainer = make(name, folder, ranks, **more)
    trainer.train(resume_from_checkpoint=resume and resume.format(name))
    trainer.evaluate()
    predicted = trainer.predict(trainer.eval_dataset)
    weights = trainer.accelerator.get_state_dict(trainer.model_wrapped)
    if trainer.accelerator.is_main_process:
        trained = [name for name, parameter in trainer.model.named_parameters() if parameter.requires_grad]
        save_file({name: weights[name].clone().contiguous() for name in trained}, folder / "weights.safetensors")
        (folder / "logs.json").write_text(json.dumps(trainer.state.log_history))
        numbers = {"rewards": sorted(predicted.predictions.tolist()), "loss": predicted.metrics["test_loss"]}
        (folder / "predicted.json").write_text(json.dumps(numbers))
    return trainer


def shard_on_cpus() -> None:
    """Lets accelerate use FSDP and DeepSpeed on CPUs, which both allow and accelerate does not think of."""
    init, prepare_backend = PartialState.__init__, PartialState._prepare_backend

    def as_gpus(self, *args, **kwargs) -> None:
        init(self, *args, **kwargs)
        if self.distributed_type == DistributedType.MULTI_CPU and os.environ.get("ACCELERATE_USE_FSDP") == "true":
            self.distributed_type = DistributedType.MULTI_GPU

    def with_gloo(self, *args, **kwargs) -> tuple[str, DistributedType]:
        backend, kind = prepare_backend(self, *args, **kwargs)
        return backend or "gloo", kind

    PartialState.__init__, PartialState._prepare_backend = as_gpus, with_gloo


ENGINES = {
    "ddp": DistributedType.MULTI_CPU,
    "fsdp2": DistributedType.FSDP,
    "zero2": DistributedType.DEEPSPEED,
    "zero3": DistributedType.DEEPSPEED,
}


def leave() -> None:
    """Ends the process group. Gloo's threads take Python's lock to let go of tensors, and would never get it from a
    process that holds it while it waits for their end; while it waits for other ranks, they get it."""
    PartialState().wait_for_everyone()
    torch.distributed.destroy_process_group()


def on_a_rank(engine: str, folder: str, *names: str, **options) -> None:
    shard_on_cpus()
    for name in names:
        (Path(folder) / name).mkdir(exist_ok=True)
        trainer = run(name, Path(folder) / name, int(os.environ["WORLD_SIZE"]), **options)
        assert trainer.accelerator.distributed_type == ENGINES[engine]
        assert engine != "fsdp2" or all(isinstance(p, DTensor) for p in trainer.model.parameters())
    leave()


def engine_file(engine: str) -> Path:
    return ROOT / "examples" / "accelerate" / f"{engine}.yaml"


def engine_environment(engine: str) -> dict[str, str]:
    """What `accelerate launch` sets for a file of examples/accelerate, but in fp32."""
    arguments = launch_command_parser().parse_args(["--config_file", str(engine_file(engine)), "train.py"])
    arguments, defaults, _ = _validate_launch_command(arguments)
    if engine.startswith("zero"):
        arguments.deepspeed_fields_from_accelerate_config = ",".join(defaults.deepspeed_config)
        _, variables = prepare_deepspeed_cmd_env(arguments)
    else:
        variables = prepare_multi_gpu_env(arguments)
    own = {name: value for name, value in variables.items() if os.environ.get(name) != value and name != "PYTHONPATH"}
    return {**own, "ACCELERATE_MIXED_PRECISION": "no", "DS_ACCELERATOR": "cpu"}


def launch(ranks: int, call: str, module: str = "test_distributed", **variables: str) -> None:
    """Runs an expression of this module, or of another one of tests, on several ranks."""
    program = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
    done = subprocess.run(
        [*program, "--no-python", sys.executable, "-c", f"import {module}; {module}.{call}"],
        env={**environment(), **variables},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-5000:]


TIMES = ("runtime", "per_second", "flos", "train_loss")  # train_loss: the mean of the losses since a resume


def assert_same(one: Path, other: Path, alone: int = 0) -> None:
    """Every number that is logged, what is predicted, and every weight, within 1e-4 of itself.

    `alone`: how many steps of `other` were one process's, which has no balance to log.
    """
    logs, expected = (json.loads((folder / "logs.json").read_text()) for folder in (other, one))
    assert len(logs) == len(expected) > 10
    balances = [found.pop("rank_balance") for found in logs if "rank_balance" in found]
    assert len(balances) + alone == sum("loss" in row for row in expected) and all(0 < share <= 1 for share in balances)
    for found, row in zip(logs, expected, strict=True):
        assert found.keys() == row.keys()
        for key in row.keys() - {key for key in row if any(part in key for part in TIMES)}:
            assert found[key] == pytest.approx(row[key], rel=1e-4, abs=2e-6), f"{key} of step {row['step']}"
    predicted, numbers = (json.loads((folder / "predicted.json").read_text()) for folder in (other, one))
    assert predicted["loss"] == pytest.approx(numbers["loss"], rel=1e-4)
    for rewards, others in zip(predicted["rewards"], numbers["rewards"], strict=True):
        assert rewards == pytest.approx(others, rel=1e-4, abs=1e-5)
    weights, trained = (load_file(folder / "weights.safetensors") for folder in (other, one))
    assert weights.keys() == trained.keys() and trained
    for name in trained:
        error = (weights[name] - trained[name]).abs().max() / trained[name].abs().max()
        assert error <= 1e-4, f"{name} differs by {error:.1e} of its largest weight"


def stored(folder: Path) -> dict[tuple, float]:
    """What the only store in a folder has: the log-prob of every key."""
    (store,) = (path for path in (folder / "reference").iterdir() if path.is_dir())
    export(store, folder / "rows.parquet")
    table = pq.read_table(folder / "rows.parquet", columns=["key", "logp"])
    return dict(zip(table["key"].to_pylist(), table["logp"].to_pylist(), strict=True))


def assert_same_store(one: Path, other: Path) -> None:
    """The same keys and, within 1e-6, log-probs."""
    known, others = stored(one), stored(other)
    assert known.keys() == others.keys() and known
    assert all(others[key] == pytest.approx(logp, abs=1e-6, rel=1e-6) for key, logp in known.items())


def check(
    tmp_path: Path,
    ranks: int,
    names: list[str],
    engine: str = "ddp",
    run: Callable[[str, Path, int], DPOTrainer] = run,
    module: str = "test_distributed",
) -> None:
    """Holds runs on several ranks, by `on_a_rank` of `module`, to those of one process, by its `run`."""
    tiny_model("llama").save_pretrained(tmp_path / "model")
    for name in names:
        (tmp_path / "one" / name).mkdir(parents=True)
        run(name, tmp_path / "one" / name, 1)
    (tmp_path / "several").mkdir()
    call = f"__import__({module!r}).on_a_rank({engine!r}, {str(tmp_path / 'several')!r}, *{names})"
    launch(ranks, f"__name__ and {call}", **engine_environment(engine))
    for name in names:
        assert_same(tmp_path / "one" / name, tmp_path / "several" / name)
        assert_same_store(tmp_path / "one" / name, tmp_path / "several" / name)


def test_two_ranks_under_ddp_train_what_one_process_trains(tmp_path):
    check(tmp_path, 2, QUICK)


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize("engine", ENGINES)
def test_ranks_under_an_engine_train_what_one_process_trains(tmp_path, engine, ranks):
    if engine.startswith("zero"):
        pytest.importorskip("deepspeed")
    check(tmp_path, ranks, list(RUNS), engine)


def first_loss_on_a_rank(folder: str) -> None:
    shard_on_cpus()
    trainer = make("groups", Path(folder), 2, bf16=True, max_steps=1)
    trainer.train()
    assert next(trainer.model.parameters()).dtype == torch.float32, "of which the engine makes bf16 ones"
    if trainer.accelerator.is_main_process:
        (Path(folder) / "loss").write_text(str(trainer.state.log_history[0]["loss"]))
    leave()


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["ddp", "fsdp2"])
def test_the_reference_of_an_engine_in_bf16_runs_in_its_arithmetic(tmp_path, engine):
    tiny_model("llama").save_pretrained(tmp_path / "model")
    folder = tmp_path / "several" / "bf16"
    folder.mkdir(parents=True)
    variables = engine_environment(engine) | {"ACCELERATE_MIXED_PRECISION": "bf16"}
    launch(2, f"first_loss_on_a_rank({str(folder)!r})", **variables)
    assert float((folder / "loss").read_text()) == pytest.approx(math.log(2), abs=1e-5)


def fill_then_find_on_a_rank(*flags: str) -> None:
    shard_on_cpus()
    assert cli.main(["cache", *flags]) == 0
    trainer = train.make_trainer(train.read_arguments([*flags, "--output_dir", f"{flags[-1]}-out"]), DPOTrainer)
    assert trainer.reference.store.computed == 0
    if trainer.accelerator.is_main_process:
        assert len(info(trainer.args.reference_cache_dir)) == 1
    leave()


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["ddp", "fsdp2", "zero3"])
def test_training_under_an_engine_finds_what_the_cache_command_computed_under_it(tmp_path, engine):
    tiny_model("llama").save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    pairs(20).to_json(tmp_path / "rows.jsonl")
    flags = ["--use_cpu", "--bf16"]
    for name, path in (("model", "model"), ("dataset", "rows.jsonl"), ("reference_cache_dir", "reference")):
        flags += [f"--{name}", str(tmp_path / path)]
    variables = engine_environment(engine) | {"ACCELERATE_MIXED_PRECISION": "bf16"}
    launch(2, f"fill_then_find_on_a_rank(*{flags!r})", **variables)


class CountCollectives(TorchDispatchMode):
    """Counts the collectives of every step by their kind."""

    def __init__(self) -> None:
        super().__init__()
        self.steps, self._step = [], Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.namespace in ("c10d", "_c10d_functional"):
            self._step[function.__name__] += 1
        return function(*args, **(kwargs or {}))

    def close(self) -> None:
        self.steps.append(dict(self._step))
        self._step.clear()


def count_on_a_rank(engine: str, folder: str, steps: int) -> None:
    """Writes down the collectives of every step, and how many packs this rank has of its own."""
    shard_on_cpus()
    counter, packs = CountCollectives(), []
    equalize_pack_counts = trainer_module.equalize_pack_counts

    def counted(batches, *args):
        packs.append([len(batch["packs"]) for batch in batches])
        return equalize_pack_counts(batches, *args)

    class Steps(TrainerCallback):
        def on_step_end(self, *args, **kwargs):
            counter.close()

    trainer_module.equalize_pack_counts = counted
    ranks = int(os.environ["WORLD_SIZE"])
    trainer = make("packs", Path(folder) / "fuzz", ranks, dataset=rows(317, seed=3), max_steps=steps)
    trainer.add_callback(Steps())
    with counter:
        trainer.train()
    counted_by = Path(folder) / f"rank-{trainer.accelerator.process_index}.json"
    counted_by.write_text(json.dumps({"steps": counter.steps, "packs": packs}))
    leave()


def check_collectives(tmp_path: Path, engine: str, steps: int) -> None:
    tiny_model("llama").save_pretrained(tmp_path / "model")
    (tmp_path / "several" / "fuzz").mkdir(parents=True)
    call = f"count_on_a_rank({engine!r}, {str(tmp_path / 'several')!r}, {steps})"
    launch(2, call, **engine_environment(engine))
    one, other = (json.loads((tmp_path / "several" / f"rank-{rank}.json").read_text()) for rank in range(2))
    assert len(one["steps"]) == steps and one["steps"] == other["steps"]
    assert sum(one["steps"][0].values()) > 3 * 8, "the counter sees what gathers and scatters weights"
    differing = sum(mine != theirs for mine, theirs in zip(one["packs"], other["packs"], strict=True))
    assert differing > steps / 4, "batches were too alike to show anything"


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["fsdp2", "zero3"])
def test_ranks_with_different_packs_run_the_same_collectives(tmp_path, engine):
    check_collectives(tmp_path, engine, steps=200)
