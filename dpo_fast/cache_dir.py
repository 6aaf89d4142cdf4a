"""Where files that can be made again are kept between runs."""

from __future__ import annotations

import os
from pathlib import Path


def cache_dir() -> Path:
    """The cache folder of dpo_fast: `$DPO_FAST_CACHE`, else `$XDG_CACHE_HOME/dpo_fast`, else `~/.cache/dpo_fast`.

    It is not created here. A variable that is set but empty counts as not set.
    """
    if own := os.environ.get("DPO_FAST_CACHE"):
        return Path(own).expanduser()
    if shared := os.environ.get("XDG_CACHE_HOME"):
        return Path(shared).expanduser() / "dpo_fast"
    return Path.home() / ".cache" / "dpo_fast"
