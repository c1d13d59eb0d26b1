"""What can be set of the embedded engine."""

from tunefork.recipe import Section


class EmbeddedSettings(Section):
    """The embedded engine."""
