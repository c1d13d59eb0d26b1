"""The group that a fleet trains."""

from collections.abc import Sequence

from tunefork.recipe import Recipe
from tunefork.sweep.group import Group, Member


def open_group(recipe: Recipe, members: Sequence[Member]) -> Group:
    raise NotImplementedError
