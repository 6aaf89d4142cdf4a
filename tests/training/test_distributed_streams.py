"""Several processes train on a stream what one process trains, and each runs the reference on its own rows alone.

The stream has more shards than there are ranks, is read ahead by a batch or two, and its last batch is a single group.
Predictions come in the order of the rows, of streams and of datasets.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import test_distributed
from safetensors.torch import save_file
from test_distributed import ENGINES, GROUPS, USE_CPU, engine_environment, launch, leave, rows, shard_on_cpus

from dpo_fast.trainer import DPOTrainer
from dpo_fast.training import stream_batches
from families import tiny_model
from preferences import make_trainer

RUNS = {
    "groups": {},
    "accumulated packs": {"max_tokens_per_micro_batch": 60, "gradient_accumulation_steps": 2},
    "adapter": {"lora": True, "optim": "adamw_torch", "learning_rate": 1e-3, "max_tokens_per_micro_batch": 60},
    "reference of its own, LD-DPO": {"ref_model": True, "ld_alpha": 0.5},
}
QUICK = ["adapter"]
OF_STREAM = sum(len(row["completions"]) for row in rows(17))


@pytest.fixture(autouse=True)
def rows_ahead(monkeypatch):
    """Puts back what `make` sets in the process that it runs in."""
    monkeypatch.setattr(stream_batches, "ROWS_AHEAD", stream_batches.ROWS_AHEAD)


def make(name: str, folder: Path, ranks: int, **more) -> DPOTrainer:
    stream_batches.ROWS_AHEAD = GROUPS // 2
    options = {"optim": "sgd", "learning_rate": 0.05, "max_steps": 10, "use_cpu": USE_CPU, **RUNS[name], **more}
    if options.pop("lora", False):
        from peft import LoraConfig

        options["peft_config"] = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    if "ref_model" in options:
        options["ref_model"] = tiny_model("llama", seed=1)
    held_out = rows(11, seed=5)
    size = GROUPS // ranks // options.get("gradient_accumulation_steps", 1)
    return make_trainer(
        folder,
        rows(17).to_iterable_dataset(num_shards=5),
        model=str(folder.parent.parent / "model"),
        eval_dataset={"stream": held_out.to_iterable_dataset(num_shards=5), "dataset": held_out},
        per_device_train_batch_size=size,
        per_device_eval_batch_size=size,
        **options,
    )


def run(name: str, folder: Path, ranks: int, **more) -> DPOTrainer:
    """Trains and evaluates; leaves logs, predictions, trained weights and what each rank computed in `folder`."""
    trainer = make(name, folder, ranks, **more)
    of_dataset = trainer.reference.store.computed
    trainer.train()
    trainer.evaluate()
    predicted = {kind: trainer.predict(dataset) for kind, dataset in trainer.eval_dataset.items()}
    weights = trainer.accelerator.get_state_dict(trainer.model_wrapped)
    if trainer.accelerator.is_main_process:
        trained = [name for name, parameter in trainer.model.named_parameters() if parameter.requires_grad]
        save_file({name: weights[name].clone().contiguous() for name in trained}, folder / "weights.safetensors")
        (folder / "logs.json").write_text(json.dumps(trainer.state.log_history))
        (rewards,) = {json.dumps(kind.predictions.tolist()) for kind in predicted.values()}
        loss = predicted["stream"].metrics["test_loss"]
        (folder / "predicted.json").write_text(json.dumps({"rewards": json.loads(rewards), "loss": loss}))
    computed = trainer.reference.store.computed - of_dataset
    (folder / f"computed-{trainer.accelerator.process_index}").write_text(str(computed))
    return trainer


def on_a_rank(engine: str, folder: str, *names: str) -> None:
    shard_on_cpus()
    for name in names:
        (Path(folder) / name).mkdir(exist_ok=True)
        trainer = run(name, Path(folder) / name, int(os.environ["WORLD_SIZE"]))
        assert trainer.accelerator.distributed_type == ENGINES[engine]
    leave()


def check(tmp_path: Path, ranks: int, names: list[str], engine: str = "ddp") -> None:
    """Also that a row's reference runs on one rank alone, and on every rank."""
    test_distributed.check(tmp_path, ranks, names, engine, run, "test_distributed_streams")
    for name in names:
        counts = [int(file.read_text()) for file in (tmp_path / "several" / name).glob("computed-*")]
        assert len(counts) == ranks and sum(counts) == OF_STREAM and min(counts) > 0


@pytest.mark.slow
def test_two_ranks_train_on_a_stream_what_one_process_trains(tmp_path):
    check(tmp_path, 2, QUICK)


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize("engine", ENGINES)
def test_ranks_under_an_engine_train_on_a_stream_what_one_process_trains(tmp_path, engine, ranks):
    if engine.startswith("zero"):
        pytest.importorskip("deepspeed")
    check(tmp_path, ranks, ["adapter"] if engine == "zero3" else list(RUNS), engine)


def refused_on_a_rank(folder: str) -> None:
    shard_on_cpus()
    with pytest.raises(ValueError, match="train_dataset: a stream keeps a copy .* ZeRO-3's shards .* train an adapter"):
        make("groups", Path(folder) / "groups", 2)
    leave()


@pytest.mark.slow
def test_a_copy_of_shards_is_refused(tmp_path):
    pytest.importorskip("deepspeed")
    tiny_model("llama").save_pretrained(tmp_path / "model")
    call = f"__import__('test_distributed_streams').refused_on_a_rank({str(tmp_path / 'several')!r})"
    launch(2, f"__name__ and {call}", **engine_environment("zero3"))


def test_predictions_of_packs_are_those_of_rows(tmp_path):
    tiny_model("llama").save_pretrained(tmp_path / "model")
    (tmp_path / "one").mkdir()
    options = ({}, {"max_tokens_per_micro_batch": 45})
    trainers = [make("groups", tmp_path / "one" / "run", 1, **packs) for packs in options]
    other = tiny_model("llama", seed=2).state_dict()
    rewards = []
    for trainer in trainers:
        trainer.model.load_state_dict(other)  # whose rewards are not 0
        rewards.append([trainer.predict(dataset).predictions for dataset in trainer.eval_dataset.values()])
    (whole, of_dataset), packed = rewards
    for values in (of_dataset, *packed):
        assert values == pytest.approx(whole, abs=1e-4)
    assert abs(whole[1:] - whole[:-1]).max() > 0.1
