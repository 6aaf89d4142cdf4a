"""A model whose layers are compiled, or computed by Liger's kernels, takes the same steps when FSDP2 shards it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from accelerate import DistributedType
from test_distributed import engine_environment, launch, leave, shard_on_cpus

from dpo_fast.model.adapters import base_of
from dpo_fast.model.layer_kernels import computed_by
from dpo_fast.trainer import DPOTrainer
from families import tiny_model
from interpreting import let_liger_be_interpreted
from preferences import logged, make_trainer, pairs


def two_steps(folder: Path, pairs_per_device: int, **options) -> DPOTrainer:
    model = tiny_model("llama", num_hidden_layers=2)
    return make_trainer(
        folder, pairs(4), model=model, max_steps=2, per_device_train_batch_size=pairs_per_device, **options
    )


def sharded_run(folder: str, kernels: str) -> None:
    if kernels == "liger":
        let_liger_be_interpreted()
    shard_on_cpus()
    backend = {"torch_compile_backend": "aot_eager"} if kernels == "compile" else {}
    trainer = two_steps(Path(folder), 1, layer_kernels=kernels, **backend)
    trainer.train()
    assert trainer.accelerator.distributed_type == DistributedType.FSDP
    assert computed_by(base_of(trainer.model)), "nothing is lost when the model is sharded"
    if trainer.accelerator.is_main_process:
        (Path(folder) / "losses").write_text(json.dumps([logged(trainer, key) for key in ("loss", "grad_norm")]))
    leave()


@pytest.mark.slow
@pytest.mark.parametrize("kernels", ["compile", "liger"])
def test_sharded_layers_take_the_same_steps(tmp_path, kernels):
    pytest.importorskip("liger_kernel")
    trainer = two_steps(tmp_path / "plain", 2)
    trainer.train()
    (tmp_path / "sharded").mkdir()
    variables = engine_environment("fsdp2") | ({"TRITON_INTERPRET": "1"} if kernels == "liger" else {})
    launch(2, f"sharded_run({str(tmp_path / 'sharded')!r}, {kernels!r})", "test_distributed_layers", **variables)
    losses, norms = json.loads((tmp_path / "sharded" / "losses").read_text())
    assert losses == pytest.approx(logged(trainer, "loss"), rel=1e-4)
    assert norms == pytest.approx(logged(trainer, "grad_norm"), rel=1e-4)
