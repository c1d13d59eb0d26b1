"""Where the user's own files lie: store, measurements, fingerprints, additions to the catalogue."""

import os
from pathlib import Path

HOME = "TUNEFORK_HOME"


def home() -> Path:
    """The folder that TUNEFORK_HOME names, else ~/.tunefork; it may not exist yet."""
    return Path(os.environ.get(HOME) or Path.home() / ".tunefork")
