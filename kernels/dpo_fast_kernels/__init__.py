"""Triton kernels and their PyTorch references for preference optimisation. Knows tensors, not preferences."""

from dpo_fast_kernels.attention.layout import PrefixLayout
from dpo_fast_kernels.attention.prefix_attention import attention_backend, prefix_attention
from dpo_fast_kernels.gather.gather_rows import GatherPlan, gather_rows
from dpo_fast_kernels.head.linear_logps import linear_logps
from dpo_fast_kernels.head.linear_preference import PreferenceLoss, linear_preference_loss
from dpo_fast_kernels.head.logits import LogitTransform, RowLogps
from dpo_fast_kernels.head.score_layout import ScoreLayout
from dpo_fast_kernels.head.sequence_logps import logps_of_logits, sequence_logps
from dpo_fast_kernels.head.sequence_loss import SequenceLoss
from dpo_fast_kernels.head.vocab_parallel import VocabularyShards

__all__ = [
    "GatherPlan",
    "LogitTransform",
    "PreferenceLoss",
    "PrefixLayout",
    "RowLogps",
    "ScoreLayout",
    "SequenceLoss",
    "VocabularyShards",
    "attention_backend",
    "gather_rows",
    "linear_logps",
    "linear_preference_loss",
    "logps_of_logits",
    "prefix_attention",
    "sequence_logps",
]
