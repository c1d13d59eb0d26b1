"""YAML as recipes, situations and catalogues are written in: YAML 1.2's numbers, no repeated keys.

PyYAML keeps to YAML 1.1, where 1e-4 is a string and 2026-11-25 a date.
"""

import re
from copy import deepcopy
from functools import lru_cache
from typing import Any

import yaml

from tunefork.errors import RecipeError


def read_yaml(text: str, where: str) -> Any:
    """`text` as plain values; raises RecipeError naming `where` and the line."""
    try:
        return deepcopy(_read(text))
    except yaml.MarkedYAMLError as error:
        at, began = error.problem_mark, error.context_mark
        line = f":{at.line + 1}" if at else ""
        context = f" ({error.context} from line {began.line + 1})" if began else ""
        raise RecipeError(f"{where}{line}: is not YAML: {error.problem}{context}") from error
    except yaml.reader.ReaderError as error:
        line = f":{text.count(chr(10), 0, error.position) + 1}"
        raise RecipeError(f"{where}{line}: is not YAML: {error.reason}") from error
    except (ValueError, RecursionError) as error:  # 0x_ is a number to PyYAML until it converts it
        raise RecipeError(f"{where}: is not YAML: {error}") from error


@lru_cache(maxsize=8)  # a run's own recipe is read at each of its stages, 20 ms a time
def _read(text: str) -> Any:
    return yaml.load(text, Loader=Loader)


class Loader(yaml.SafeLoader):
    """YAML 1.2's floats (PyYAML reads 1e-4 as a string), no dates, no silently repeated keys."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        for key_node, key in zip(node.value, keys, strict=True):
            if keys.count(key) > 1:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {key!r} stands twice", key_node[0].start_mark
                )
        return super().construct_mapping(node, deep)


class Dumper(yaml.SafeDumper):
    """Quotes each string that `Loader` would read as something else."""


Loader.yaml_implicit_resolvers = {
    first: [resolver for resolver in resolvers if resolver[0] != "tag:yaml.org,2002:timestamp"]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
for _yaml in (Loader, Dumper):
    _yaml.add_implicit_resolver(
        "tag:yaml.org,2002:float",
        re.compile(r"^[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)[eE][-+]?[0-9]+$"),
        list("-+0123456789."),
    )
