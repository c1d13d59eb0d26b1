"""Engines by their names; each is imported only where it is asked for."""

from importlib import import_module
from typing import cast

from tunefork.errors import BadInputError
from tunefork.serve.engine import Engine, ServedAdapter
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


def make_replica(settings: ServeSettings, adapter: ServedAdapter) -> Engine:
    """An engine whose base has `adapter` in its weights. Raises BadInputError where there is none
    such."""
    if settings.engine != "embedded":
        raise BadInputError(
            f"merge: the {settings.engine} engine has no merged replicas; merge the adapter "
            "(tunefork merge) and serve the model that comes out as a base of its own"
        )
    module, name = ENGINES["embedded"]
    return cast(Engine, getattr(import_module(module), name)(settings, merged=adapter))
