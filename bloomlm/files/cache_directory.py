"""The place of files that can be made again."""

import os
from pathlib import Path


def default_cache_dir() -> Path:
    """$BLOOMLM_CACHE, else $XDG_CACHE_HOME/bloomlm, else ~/.cache/bloomlm."""
    if own := os.environ.get("BLOOMLM_CACHE"):
        return Path(own)
    shared = os.environ.get("XDG_CACHE_HOME")
    return (Path(shared) if shared else Path.home() / ".cache") / "bloomlm"
