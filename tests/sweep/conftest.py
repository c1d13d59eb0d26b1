from tests.recipes import base, make_recipe

__all__ = ["base", "make_recipe"]
