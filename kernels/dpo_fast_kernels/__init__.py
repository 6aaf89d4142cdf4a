"""Triton kernels and their PyTorch references for preference optimisation. Knows tensors, not preferences."""

from dpo_fast_kernels.gather_rows import GatherPlan, gather_rows
from dpo_fast_kernels.layout import PrefixLayout
from dpo_fast_kernels.linear_logps import linear_logps
from dpo_fast_kernels.logits import LogitTransform, RowLogps
from dpo_fast_kernels.prefix_attention import attention_backend, prefix_attention

__all__ = [
    "GatherPlan",
    "LogitTransform",
    "PrefixLayout",
    "RowLogps",
    "attention_backend",
    "gather_rows",
    "linear_logps",
    "prefix_attention",
]
