"""How many positions a model has: as many as its table of position embeddings has rows; without a table, any number."""

from __future__ import annotations

from torch import Tensor, nn

# What models of transformers call the table beside their token embeddings.
_TABLES = {"wpe", "embed_positions", "position_embeddings", "position_embedding", "positions_embed", "pos_encoding"}
_SINES = "embed_positions"  # a table of sines and cosines in each attention layer of GPT-J and CodeGen


def most_positions(*models: nn.Module | None) -> int | None:
    """Return the longest sequence that all models have positions for; None where no model bounds it."""
    return min((size for model in models if model is not None for size in _sizes(model)), default=None)


def _sizes(model: nn.Module) -> list[int]:
    tokens = model.get_input_embeddings()
    decoder = next(module for module in model.modules() if any(child is tokens for child in module.children()))
    tables = [getattr(decoder, name, None) for name in _TABLES]
    tables += [buffer for name, buffer in decoder.named_buffers() if name.endswith(f".attn.{_SINES}")]
    return [size for table in tables if (size := _rows(table)) is not None]


def _rows(table: object) -> int | None:
    """Return how many positions a table has, less those before the first that OPT and Bart leave unused."""
    if isinstance(table, nn.Module):  # maybe below what an adapter wraps around it
        embeddings = (module for module in table.modules() if isinstance(module, nn.Embedding))
        table = next(embeddings, None)
    if isinstance(table, nn.Embedding):
        return table.num_embeddings - getattr(table, "offset", 0)
    return table.shape[0] if isinstance(table, Tensor) and table.ndim == 2 else None
