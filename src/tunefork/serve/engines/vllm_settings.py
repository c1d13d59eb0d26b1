"""What can be set of the vllm engine."""

from tunefork.recipe import Section


class VllmSettings(Section):
    """The vllm engine."""
