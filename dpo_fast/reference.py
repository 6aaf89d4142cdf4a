"""Reference log-probs, computed once and kept on disk.

A store is a folder of immutable Parquet parts, `<root>/<key>/part-<checksum>.parquet`, a row a completion:

    key          16 bytes, hash of the prompt's and the completion's token ids as the model sees them (after truncation)
    num_tokens   int32, scored tokens
    logp         fp32, their summed log-prob, in nats
    token_logps  list of fp32

The folder's key hashes everything that the numbers depend on: the reference's weights, the transforms of the logits,
the compute dtype, the attention and the version of this format. A part is written under a temporary name and renamed to
the hash of its bytes, so a reader sees whole parts only and knows a damaged one. No pickle anywhere.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from datasets import Dataset
from torch import Tensor
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from dpo_fast.groups import Layout, PackedBatch, PreferenceGroup, pack
from dpo_fast.head import logit_transform
from dpo_fast.sampler import split_by_tokens

logger = logging.getLogger(__name__)

STORE_VERSION = 1
TOKENS_PER_PASS = 8192
ROWS_PER_PART = 10_000
SECONDS_PER_PART = 60.0

_SCHEMA = pa.schema(
    [
        ("key", pa.binary(16)),
        ("num_tokens", pa.int32()),
        ("logp", pa.float32()),
        ("token_logps", pa.list_(pa.float32())),
    ]
)


def completion_key(prompt_ids: Sequence[int], completion_ids: Sequence[int], context_length: int = 0) -> bytes:
    """128-bit key of a completion after its prompt; leading context of the completion counts as prompt."""
    ids = np.asarray([*prompt_ids, *completion_ids], np.int64)
    boundary = np.int64(len(prompt_ids) + context_length)
    return hashlib.blake2b(boundary.tobytes() + ids.tobytes(), digest_size=16).digest()


def weights_fingerprint(model: torch.nn.Module, adapters: bool) -> str:
    """Hash of names, shapes, dtypes and content of all parameters and persistent buffers.

    Args:
        adapters: whether PEFT adapters count. Without them a wrapped model has the fingerprint of its bare base model.
    """
    digest = hashlib.blake2b(digest_size=16)
    for name, tensor in sorted(_named_weights(model, adapters)):
        tensor = tensor.detach().contiguous()
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}\n".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).cpu().numpy())
    return digest.hexdigest()


def _named_weights(model: torch.nn.Module, adapters: bool) -> Iterable[tuple[str, Tensor]]:
    for name, tensor in model.state_dict().items():
        if adapters or not hasattr(model, "peft_config"):
            yield name, tensor
        elif not re.search(r"\.(lora_|modules_to_save\.)", name):
            yield re.sub(r"^base_model\.model\.|\.(base_layer|original_module)(?=\.)", "", name), tensor


def reference_description(
    model: PreTrainedModel,
    *,
    adapters: bool,
    dtype: torch.dtype,
    attention: str,
) -> dict[str, object]:
    """Everything that reference log-probs depend on besides the tokens; its hash is the store's folder."""
    return {
        "version": STORE_VERSION,
        "architecture": type(model.get_base_model() if hasattr(model, "peft_config") else model).__name__,
        "weights": weights_fingerprint(model, adapters),
        "logits": asdict(logit_transform(model.config.get_text_config())),
        "dtype": str(dtype).removeprefix("torch."),
        "attention": attention,
    }


@dataclass
class ReferenceStore:
    """Reference log-probs of one reference model, on disk under `root`.

    Attributes:
        folder: where its parts lie.
        logps: sequence log-probs by completion key, of all rows on disk and added.
        computed: how many rows were added since the store was opened.
    """

    root: Path
    description: Mapping[str, object]
    logps: dict[bytes, float] = field(default_factory=dict)
    computed: int = 0

    def __post_init__(self) -> None:
        text = json.dumps(self.description, sort_keys=True, indent=2)
        self.folder = Path(self.root) / hashlib.blake2b(text.encode(), digest_size=16).hexdigest()
        self.folder.mkdir(parents=True, exist_ok=True)
        self._pending: list[tuple[bytes, np.ndarray]] = []
        self._last_flush = time.monotonic()
        _write_whole(self.folder / "reference.json", text.encode())
        for part in sorted(self.folder.glob("part-*.parquet")):
            self._read(part)

    def _read(self, part: Path) -> None:
        data = part.read_bytes()
        if part.name != _part_name(data):
            aside = part.with_suffix(".damaged")
            part.rename(aside)
            logger.warning("%s does not match its checksum: set aside as %s, its rows are recomputed", part, aside.name)
            return
        table = pq.read_table(pa.BufferReader(data), columns=["key", "logp"])
        self.logps.update(zip(table["key"].to_pylist(), table["logp"].to_pylist(), strict=True))

    def add(self, key: bytes, token_logps: np.ndarray) -> None:
        """Adds a completion's token log-probs, fp32 [n]; parts are flushed every 10 000 rows or 60 s."""
        self.logps[key] = float(np.float32(token_logps.sum(dtype=np.float64)))
        self.computed += 1
        self._pending.append((key, token_logps))
        if len(self._pending) >= ROWS_PER_PART or time.monotonic() - self._last_flush > SECONDS_PER_PART:
            self.flush()

    def token_logps(self) -> dict[bytes, np.ndarray]:
        """Token log-probs of all rows on disk, by completion key."""
        rows: dict[bytes, np.ndarray] = {}
        for part in sorted(self.folder.glob("part-*.parquet")):
            table = pq.read_table(part, columns=["key", "token_logps"])
            rows.update(zip(table["key"].to_pylist(), table["token_logps"].to_pylist(), strict=True))
        return rows

    def flush(self) -> None:
        """Writes what was added since the last part."""
        self._last_flush = time.monotonic()
        if not self._pending:
            return
        keys, token_logps = zip(*self._pending, strict=True)
        columns = [keys, [len(row) for row in token_logps], [self.logps[key] for key in keys], token_logps]
        arrays = [pa.array(column, field.type) for column, field in zip(columns, _SCHEMA, strict=True)]
        sink = pa.BufferOutputStream()
        pq.write_table(pa.Table.from_arrays(arrays, schema=_SCHEMA), sink, compression="zstd")
        data = sink.getvalue().to_pybytes()
        _write_whole(self.folder / _part_name(data), data)
        self._pending = []


def _part_name(data: bytes) -> str:
    return f"part-{hashlib.blake2b(data, digest_size=16).hexdigest()}.parquet"


def _write_whole(path: Path, data: bytes) -> None:
    """Writes under a temporary name in the same folder, then renames: readers never see half a file."""
    with tempfile.NamedTemporaryFile(dir=path.parent, prefix=".writing-", delete=False) as file:
        file.write(data)
    os.replace(file.name, path)


def with_reference_logps(
    dataset: Dataset,
    store: ReferenceStore,
    score: Callable[[PackedBatch], Tensor],
    *,
    layout: Layout,
    max_tokens: int | None = None,
    column: Literal["ref_logps", "ref_token_logps"] = "ref_logps",
    name: str = "train",
) -> Dataset:
    """Adds reference log-probs, of completions or of all their tokens, to a tokenised dataset.

    Only completions that `store` lacks are run.

    Args:
        dataset: columns named as the attributes of `PreferenceGroup`.
        score: runs the reference on a packed batch (on the host) and returns its token log-probs [N], without gradient.
        layout: of the packed batches.
        max_tokens: bound on the packed tokens of a forward pass, 8192 unless given.
        column: which to add.
        name: of the dataset, for the progress bar.
    """
    groups = [PreferenceGroup.from_row(row) for row in dataset.remove_columns(_without(dataset, "ref_logps"))]
    keys = [
        [
            completion_key(group.prompt_ids, ids, context)
            for ids, context in zip(group.completion_ids, group.contexts, strict=True)
        ]
        for group in groups
    ]
    missing = [i for i, row in enumerate(keys) if not all(key in store.logps for key in row)]
    logger.info(
        "reference log-probs of %s: %d of %d groups in %s", name, len(groups) - len(missing), len(groups), store.folder
    )
    costs = [groups[i].num_tokens(layout) for i in missing]
    batches = split_by_tokens(missing, costs, max_tokens or TOKENS_PER_PASS)
    with tqdm(total=len(missing), desc=f"Reference log-probs of {name}", unit="group", disable=not missing) as progress:
        for batch in batches:
            packed = pack([groups[i] for i in batch], layout)
            pieces = score(packed).float().cpu().split(packed.cu_scores.diff().tolist())
            for key, piece in zip((key for i in batch for key in keys[i]), pieces, strict=True):
                if key not in store.logps:
                    store.add(key, piece.numpy())
            progress.update(len(batch))
    store.flush()
    known = store.logps if column == "ref_logps" else store.token_logps()
    return dataset.add_column(column, [[known[key] for key in row] for row in keys])


def _without(dataset: Dataset, column: str) -> list[str]:
    return [column] if column in dataset.column_names else []
