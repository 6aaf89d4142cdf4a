"""Tiny models on a shared machine: one thread, no network, no progress bars, a cache of its own."""

from __future__ import annotations

import os
import tempfile

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
os.environ["DPO_FAST_CACHE"] = os.path.join(tempfile.gettempdir(), "dpo_fast_tests")

import torch
from hypothesis import settings

torch.set_num_threads(1)
settings.register_profile("default", deadline=None, max_examples=50, derandomize=True)
settings.load_profile("default")
