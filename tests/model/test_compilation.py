"""`torch_compile=True` compiles a model's layers in place, once for all of them and all lengths, and changes no result.

With the backend that traces and runs eagerly, as all of it but the code that Inductor writes.
"""

from __future__ import annotations

import pytest
import torch
from torch._dynamo.utils import counters

from families import tiny_model
from preferences import logged, make_trainer, pairs, trained

TIMES = ("runtime", "per_second")


def options(**more) -> dict:
    return {"max_steps": 6, "per_device_train_batch_size": 2, "eval_dataset": pairs(6, seed=3), **more}


@pytest.mark.parametrize(
    "more",
    [
        {},
        *(
            pytest.param(more, marks=pytest.mark.slow)
            for more in ({"gradient_checkpointing": True}, {"layout": "padded"})
        ),
    ],
)
def test_a_compiled_run_takes_the_same_steps(tmp_path, more):
    eager = make_trainer(tmp_path / "eager", pairs(12), **options(**more))
    expected = trained(eager)
    torch._dynamo.reset()
    counters.clear()
    compiled = make_trainer(
        tmp_path / "compiled", pairs(12), torch_compile=True, torch_compile_backend="aot_eager", **options(**more)
    )
    weights = trained(compiled)
    assert weights.keys() == expected.keys()
    for name, value in weights.items():
        torch.testing.assert_close(value, expected[name], rtol=1e-4, atol=1e-6)
    for key in ("loss", "grad_norm", "rewards/margins", "num_tokens"):
        assert logged(compiled, key) == pytest.approx(logged(eager, key), rel=1e-4, abs=1e-6)
    held_out = {name: value for name, value in eager.evaluate().items() if not name.endswith(TIMES)}
    assert {name: compiled.evaluate()[name] for name in held_out} == pytest.approx(held_out, rel=1e-4, abs=1e-5)
    # A graph each for passes with and without gradient, and in the padded layout for batches that need no padding.
    assert 0 < counters["stats"]["unique_graphs"] <= 4
    assert not counters["graph_break"]


def test_the_loss_begins_at_ln_2_and_the_reference_is_the_compiled_models_own(tmp_path):
    model = tiny_model("llama")
    trainer = make_trainer(tmp_path, pairs(12), model=model, torch_compile=True, torch_compile_backend="aot_eager")
    trainer.train()
    assert logged(trainer, "loss")[0] == pytest.approx(0.6931472, abs=1e-6)
    folders = {folder.name for folder in (tmp_path / "reference").iterdir() if folder.is_dir()}
    make_trainer(tmp_path, pairs(12), model=tiny_model("llama"))
    assert {folder.name for folder in (tmp_path / "reference").iterdir() if folder.is_dir()} > folders
