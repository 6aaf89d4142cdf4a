"""Which rank takes which groups of a step, so that the slowest is waited for least.

    cost(group) = 2·P·tokens + 2·H·V·score rows + 4·H·L·visible pairs        FLOP of a forward; a step takes thrice that

Groups differ in length by orders of magnitude, and a step is as slow as its slowest rank. So ranks do not take equally
many groups but equal costs, longest first. A group's gradient does not depend on the rank that has it, so the groups of
a step are those of one process with the same seed and batch, and so is the sum of its gradients.

All ranks assign all groups of the step, by integers alone, and so agree without a word.
P parameters of the body, H hidden, L layers, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING

import pyarrow.compute as pc

from dpo_fast.batches.groups import num_tokens
from dpo_fast.batches.token_budget import assign_greedily, longest_first
from dpo_fast.data.columns import token_tables
from dpo_fast.model.loading import vocabulary_size

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedModel

    from dpo_fast.batches.groups import Layout


@dataclass(frozen=True)
class GroupCost:
    """What a preference group costs: FLOP of a forward, an int.

    Attributes:
        parameters: of the body, without embeddings and LM head.
        hidden_size, num_layers, vocab_size: of the model.
        layout: of the packed batches.
    """

    parameters: int
    hidden_size: int
    num_layers: int
    vocab_size: int
    layout: Layout = "shared"

    @classmethod
    def of_model(cls, model: PreTrainedModel, layout: Layout = "shared") -> GroupCost:
        """Reads the sizes of a causal language model; call it before FSDP shards the parameters."""
        config = model.config.get_text_config()
        outside = {id(module.weight) for module in (model.get_input_embeddings(), model.get_output_embeddings())}
        body = (parameter for parameter in model.parameters() if id(parameter) not in outside)
        parameters = sum(getattr(parameter, "ds_numel", parameter.numel()) for parameter in body)
        head = model.get_output_embeddings().weight
        hidden_size = getattr(head, "ds_shape", head.shape)[-1]
        layers = getattr(config, "num_hidden_layers", 1)  # which a model of several decoders does not have
        return cls(parameters, hidden_size, layers, vocabulary_size(model), layout)

    def __call__(self, prompt: int, completions: Sequence[int]) -> int:
        """Returns the cost of a group from the tokens of its prompt and of its completions."""
        if self.layout == "shared":
            pairs = _own_past(prompt) + sum(prompt * length + _own_past(length) for length in completions)
        else:
            pairs = _own_past(prompt + max(completions)) * len(completions)
        body = self.parameters * self.tokens(prompt, completions)
        head = self.hidden_size * self.vocab_size * sum(completions)
        return 2 * (body + head) + 4 * self.hidden_size * self.num_layers * pairs

    def of_dataset(self, dataset: Dataset) -> list[int]:
        """Returns the costs of all groups of a tokenised dataset."""
        return [self(prompt, completions) for prompt, completions in group_lengths(dataset)]

    def tokens(self, prompt: int, completions: Sequence[int]) -> int:
        """Returns the token positions of a group."""
        return num_tokens(prompt, completions, self.layout)


def group_lengths(dataset: Dataset) -> Iterator[tuple[int, list[int]]]:
    """Yields the tokens of the prompt and of the completions of every group of a tokenised dataset."""
    for table in token_tables(dataset):
        lengths = iter(pc.list_value_length(pc.list_flatten(table["completion_ids"])).to_pylist())
        counts = pc.list_value_length(table["completion_ids"]).to_pylist()
        for prompt, count in zip(pc.list_value_length(table["prompt_ids"]).to_pylist(), counts, strict=True):
            yield prompt, list(islice(lengths, count))


def _own_past(length: int) -> int:
    return length * (length + 1) // 2


def assign_groups(costs: Sequence[int], ranks: int) -> list[list[int]]:
    """Assign the groups of a step: for every rank its groups, as ascending indices.

    No rank exceeds another by more than the cost of one group, and a rank has no group at all only if there are fewer
    groups than ranks.

    Args:
        costs: of every group of the step, 1 or more, in the order of the sampler.
        ranks: how many ranks there are.

    Raises:
        ValueError: a cost is below 1.
    """
    if costs and min(costs) < 1:
        raise ValueError(f"costs must be 1 or more, got {min(costs)}")
    return [sorted(part) for part in assign_greedily(longest_first(costs), costs, ranks)]


def mean_to_max(loads: Sequence[float]) -> float:
    """Returns the share of their time that ranks work, and do not wait for the slowest: 1 is perfect balance."""
    return sum(loads) / (len(loads) * max(loads)) if any(loads) else 1.0
