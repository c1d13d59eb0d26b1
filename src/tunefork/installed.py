"""Versions: this library's own, and those of installed packages, each looked up once.

Its own is said here, and its package is given it from here (`pyproject.toml`): sources that are run
where nothing is installed know it too. A look-up of another's reads and parses a file.
"""

from functools import cache
from importlib import metadata

OWN_VERSION = "0.1.0"

version = cache(metadata.version)
