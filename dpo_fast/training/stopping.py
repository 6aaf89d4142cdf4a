"""The end of a run that somebody asks for: after the step under way, with a last checkpoint, on all ranks at once."""

from __future__ import annotations

from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import SaveStrategy


class Stopping(TrainerCallback):
    """Ends training after a step in which all ranks know that one of them was asked to stop.

    Attributes:
        asked: whether this rank was asked; set it from a signal handler, a thread, a callback.
        agreed: whether all ranks know: `DPOTrainer` tells them with what they tell each other before each step.
    """

    def __init__(self) -> None:
        self.asked = self.agreed = False

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self.agreed = False

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if self.agreed or (self.asked and args.world_size == 1):
            control.should_training_stop = True
            control.should_evaluate = False
            control.should_save = args.save_strategy != SaveStrategy.NO
