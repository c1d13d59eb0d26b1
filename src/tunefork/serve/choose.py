"""Engines by their names; each is imported only where it is asked for."""

from importlib import import_module
from typing import cast

from tunefork.serve.engine import Engine
from tunefork.serve.settings import ServeSettings

ENGINES = {
    "embedded": ("tunefork.serve.engines.embedded", "EmbeddedEngine"),
    "vllm": ("tunefork.serve.engines.vllm", "VllmEngine"),
}
"""Name -> module and class, whose constructor takes the settings."""


def make_engine(settings: ServeSettings) -> Engine:
    """The engine that `settings.engine` names, not yet started."""
    module, name = ENGINES[settings.engine]
    return cast(Engine, getattr(import_module(module), name)(settings))
