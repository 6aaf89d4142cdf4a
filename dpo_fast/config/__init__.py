"""The options of a run: `DPOConfig`, the types of options, and the rules that hold between them.

`DPOConfig` comes when it is asked for: the types are there without the seconds that transformers takes.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dpo_fast.config.dpo_config import DPOConfig

__all__ = ["DPOConfig"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from dpo_fast.config.dpo_config import DPOConfig

    return DPOConfig
