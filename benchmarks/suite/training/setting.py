"""How one side of run.py speed trains."""

from __future__ import annotations

from dataclasses import dataclass

PROVIDER_NAMES = ("dpo_fast", "patch_trl", "trl", "plain")


@dataclass(frozen=True)
class Setting:
    """A side and all that its process needs to know, beside the rows.

    Attributes:
        provider: who trains, one of `PROVIDER_NAMES`.
        model: one of `models.RANDOM_MODELS`, a folder, or a name on the Hub.
        micro_batch: rows of the side (groups, or for trainers of pairs their pairs) in one forward and backward.
        accumulation: micro-batches of an optimizer step.
        checkpointing: recompute activations in the backward.
        compiled: torch.compile; whole in other trainers, layer by layer in dpo_fast.
        precision: fp32, or bf16 for autocast; frozen weights (LoRA) are bf16 then.
        lora: train a rank-16 adapter of all linear layers.
        max_length: tokens that rows were cut to.
        max_tokens: of a pack of dpo_fast; None for what it takes by itself.
        steps: timed optimizer steps; one before them warms up.
        watched: whether one more step is watched for host syncs and time by part.
        memory_gib: what the process may allocate; None for what is free.
        learning_rate: of the first step; it falls linearly to 0.
    """

    provider: str
    model: str
    micro_batch: int
    accumulation: int = 1
    checkpointing: bool = False
    compiled: bool = False
    precision: str = "fp32"
    lora: bool = False
    max_length: int = 1024
    max_tokens: int | None = None
    steps: int = 6
    watched: bool = True
    memory_gib: float | None = None
    learning_rate: float = 1e-6

    @property
    def all_steps(self) -> int:
        return 1 + self.steps + self.watched

    @property
    def rows(self) -> int:
        """Rows of one optimizer step."""
        return self.micro_batch * self.accumulation
