"""Bytes of elementwise work in a step of 1 B weights, by what computes the layers: the figures of docs/LOG.md.

Counted, not measured. Releases of PyTorch and transformers may count a little differently.
"""

from __future__ import annotations

import pytest
import torch

from dpo_fast.model.layer_kernels import use_liger
from layer_bytes import CountBytes, count, count_compiled

GB = 1e9
EAGER = {False: 121.2, True: 169.6}  # by whether weights are in fp32 and products in bf16 by autocast


def test_what_an_operation_reads_and_writes_is_counted_once():
    a, b = torch.zeros(3, 5), torch.zeros(1, 5).expand(3, 5)
    with CountBytes() as counter:
        (a * b).view(15).detach().add_(1)
        a @ b.mT
    assert counter.bytes == {"mul": 4 * (15 + 5 + 15), "add_": 4 * (15 + 15)}


@pytest.mark.parametrize("autocast", [False, True])
def test_layers_of_plain_operations(autocast):
    assert sum(count(autocast).values()) / GB == pytest.approx(EAGER[autocast], rel=0.05)


@pytest.mark.parametrize(("autocast", "expected"), [(False, 35.1), (True, 80.4)])
def test_layers_with_ligers_kernels(autocast, expected):
    pytest.importorskip("liger_kernel")
    found = count(autocast, lambda model: use_liger(model, {}))
    assert sum(found.values()) / GB == pytest.approx(expected, rel=0.05)
    assert found["_rms_norm_forward_kernel"] and found["_swiglu_backward_kernel"] and found["_triton_rope"]


@pytest.mark.slow
@pytest.mark.parametrize(("autocast", "expected"), [(False, 32.7), (True, 52.5)])
def test_layers_compiled(autocast, expected):
    assert count_compiled(autocast) / GB == pytest.approx(expected, rel=0.05)
