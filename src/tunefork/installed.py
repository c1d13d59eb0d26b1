"""Versions of installed packages, each looked up once: a look-up reads and parses a file."""

from functools import cache
from importlib import metadata

version = cache(metadata.version)
