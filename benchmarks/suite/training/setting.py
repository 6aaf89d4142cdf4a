"""The setting of one side of run.py speed."""

from __future__ import annotations

from dataclasses import dataclass

PROVIDER_NAMES = ("dpo_fast", "patch_trl", "trl", "plain")


@dataclass(frozen=True)
class Setting:
    """A side and all that its process needs to know, beside the rows.

    Attributes:
        provider: trainer, one of `PROVIDER_NAMES`.
        model: one of `models.RANDOM_MODELS`, a folder, or a name on the Hub.
        micro_batch: number of the side's rows in one forward and backward: groups, or pairs for trainers of pairs.
        accumulation: number of micro-batches in an optimizer step.
        checkpointing: whether the backward recomputes activations.
        compiled: whether torch.compile is used; whole in other trainers, layer by layer in dpo_fast.
        layer_kernels: what fuses the layers of dpo_fast, as its option of that name; None for its own choice.
        precision: fp32, or bf16 for autocast; frozen weights (LoRA) are bf16 then.
        lora: whether a rank-16 adapter of all linear layers is trained.
        max_length: number of tokens that rows were cut to.
        max_tokens: bound on the tokens of a pack of dpo_fast; None for its own choice.
        steps: number of timed optimizer steps; one before them warms up.
        watched: whether one more step is watched for host syncs and time by part.
        memory_gib: memory that the process may allocate; None for what is free.
        learning_rate: learning rate of the first step; it falls linearly to 0.
    """

    provider: str
    model: str
    micro_batch: int
    accumulation: int = 1
    checkpointing: bool = False
    compiled: bool = False
    layer_kernels: str | None = None
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
        """Return the number of rows in one optimizer step."""
        return self.micro_batch * self.accumulation
