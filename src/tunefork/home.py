"""Where the user's own files lie: store, measurements, fingerprints, additions to the catalogue.
And where what can be made again does."""

import os
from pathlib import Path

HOME = "TUNEFORK_HOME"


def home() -> Path:
    """The folder that TUNEFORK_HOME names, else ~/.tunefork; it may not exist yet."""
    return Path(os.environ.get(HOME) or Path.home() / ".tunefork")


def cache_folder() -> Path:
    """Of converted models and compiled kernels: TUNEFORK_CACHE, else ~/.cache/tunefork."""
    return Path(os.environ.get("TUNEFORK_CACHE") or "~/.cache/tunefork").expanduser()
