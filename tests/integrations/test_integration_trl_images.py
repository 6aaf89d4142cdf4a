"""Under the patch, TRL's trainer runs its own path on images, or on text with a model of images, and says so once."""

from __future__ import annotations

import random

import pytest
import torch
from datasets import Dataset
from transformers import AutoConfig, AutoModelForImageTextToText, PreTrainedTokenizerBase

from families import VOCAB, tiny_tokenizer

trl = pytest.importorskip("trl")
images = pytest.importorskip("PIL.Image")

from transformers import CLIPImageProcessorPil, LlavaProcessor  # noqa: E402

from dpo_fast.integrations.trl import patch_trl, unpatch_trl  # noqa: E402

PATCH_SIZE, IMAGE_SIZE = 14, 28
_TEMPLATE = (
    "{% for message in messages %}{% for part in message.content %}"
    "{{ '<image> ' if part.type == 'image' else part.text + ' ' }}{% endfor %}{% endfor %}"
)


def tokenizer() -> PreTrainedTokenizerBase:
    words = tiny_tokenizer()
    words.add_special_tokens({"additional_special_tokens": ["<image>"]})
    words.chat_template = _TEMPLATE
    return words


def processor() -> LlavaProcessor:
    side = {"height": IMAGE_SIZE, "width": IMAGE_SIZE}
    return LlavaProcessor(
        CLIPImageProcessorPil(size={"shortest_edge": IMAGE_SIZE}, crop_size=side),
        tokenizer(),
        patch_size=PATCH_SIZE,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=_TEMPLATE,
    )


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = AutoConfig.for_model(
        "llava",
        text_config={"model_type": "llama", "vocab_size": VOCAB + 1, "pad_token_id": 0, **sizes},
        vision_config={
            "model_type": "clip_vision_model", "image_size": IMAGE_SIZE, "patch_size": PATCH_SIZE, **sizes
        },
        image_token_index=VOCAB,
    )  # fmt: skip
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("llava")
    AutoModelForImageTextToText.from_config(config).save_pretrained(folder)
    return str(folder)


def rows(with_images: bool) -> Dataset:
    generator = random.Random(0)

    def says(role: str) -> list[dict[str, str]]:
        words = " ".join(f"w{generator.randrange(3, VOCAB)}" for _ in range(generator.randrange(1, 6)))
        return [{"role": role, "content": words}]

    found = [{"prompt": says("user"), "chosen": says("assistant"), "rejected": says("assistant")} for _ in range(8)]
    if with_images:
        for number, row in enumerate(found):
            row["image"] = images.new("RGB", (40, 30), (30 * number, 200, 20 * number))
    return Dataset.from_list(found)


@pytest.mark.parametrize("with_images", [True, False], ids=["images", "text alone"])
def test_images_train_as_without_the_patch(model, tmp_path, caplog, with_images):
    def steps():
        args = trl.DPOConfig(
            output_dir=str(tmp_path), use_cpu=True, bf16=False, report_to=[], max_steps=4, logging_steps=1,
            per_device_train_batch_size=2, learning_rate=1e-3, save_strategy="no", disable_tqdm=True, max_length=None,
        )  # fmt: skip
        trainer = trl.DPOTrainer(model, args=args, train_dataset=rows(with_images), processing_class=processor())
        trainer.train()
        return [row for row in trainer.state.log_history if "loss" in row]

    theirs = steps()
    patch_trl()
    try:
        mine = steps()
    finally:
        unpatch_trl()
    said = [record.message for record in caplog.records if "TRL's own path" in record.message]
    assert len(said) == 1 and "images" in said[0]
    for row, other in zip(mine, theirs, strict=True):
        for name in ("loss", "grad_norm", "logps/chosen", "logps/rejected", "entropy"):
            assert row[name] == pytest.approx(other[name], rel=1e-4), name
    assert mine[0]["loss"] != pytest.approx(mine[-1]["loss"], rel=1e-4), "it trains"
