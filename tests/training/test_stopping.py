"""A run that is asked to stop ends after a step, with a checkpoint; all ranks end at once when one of them is asked."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from test_distributed import engine_environment, launch, leave, make, shard_on_cpus
from transformers import TrainerCallback

from families import tiny_model
from preferences import make_trainer, pairs


class _Asks(TrainerCallback):
    """Asks a trainer to stop while a step runs."""

    def __init__(self, trainer, step: int):
        self.trainer, self.step = trainer, step

    def on_substep_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            self.trainer.stopping.asked = True

    on_step_begin = on_substep_end


@pytest.mark.parametrize(("save_strategy", "checkpoints"), [("steps", ["checkpoint-3"]), ("no", [])])
def test_a_run_ends_after_the_step_in_which_it_is_asked(tmp_path, save_strategy, checkpoints):
    trainer = make_trainer(
        tmp_path, pairs(8), max_steps=9, save_strategy=save_strategy, eval_strategy="steps", eval_dataset=pairs(2)
    )
    trainer.add_callback(_Asks(trainer, 2))
    trainer.train()
    assert trainer.state.global_step == 3
    assert [path.name for path in Path(trainer.args.output_dir).glob("checkpoint-*")] == checkpoints


def on_a_rank(folder: str) -> None:
    shard_on_cpus()
    trainer = make("groups", Path(folder), 2, save_strategy="steps", save_steps=100)
    if os.environ["RANK"] == "1":
        trainer.add_callback(_Asks(trainer, 4))
    trainer.train()
    Path(folder, f"stopped-{os.environ['RANK']}").write_text(str(trainer.state.global_step))
    leave()


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["ddp", "fsdp2"])
def test_all_ranks_end_together_when_one_is_asked(tmp_path, engine):
    tiny_model("llama").save_pretrained(tmp_path / "model")
    folder = tmp_path / "several" / "run"
    folder.mkdir(parents=True)
    launch(2, f"on_a_rank({str(folder)!r})", "test_stopping", **engine_environment(engine))
    steps = {int(path.read_text()) for path in folder.glob("stopped-*")}
    assert len(list(folder.glob("stopped-*"))) == 2 and len(steps) == 1 and steps <= {5, 6}
    assert list(folder.rglob(f"checkpoint-{steps.pop()}/trainer_state.json"))
