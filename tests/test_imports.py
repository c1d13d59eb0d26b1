"""Imports go one way, and asking for help loads nothing heavy."""

import ast
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

import tunefork

SOURCE = Path(tunefork.__file__).parent
ORDER = [
    "schema_markdown",
    "errors",
    "home",
    "installed",
    "yaml_text",
    "recipe",
    "recipe_file",
    "data",
    "kernels",
    "model",
    "train",
    "evaluate",
    "registry",
    "export",
    "plan",
    "trial",
    "page",
    "sweep",
    "compare",
    "advise",
    "serve",
    "cli",
    "__main__",
]
ASIDE = {"__init__", "documentation"}
"""The Python API, and what writes the reference pages: nothing of the chain may import them."""
MODULES = sorted(SOURCE.rglob("*.py"))


def _name(file: Path) -> str:
    """`tunefork.data.mask` of its file."""
    parts = file.relative_to(SOURCE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


@cache
def _imported(source: str) -> list[tuple[int, str]]:
    """Line and name of each module that is imported anywhere, inside functions too."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found += [(node.lineno, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0 and node.module is not None, "relative imports are banned"
            found += [(node.lineno, f"{node.module}.{alias.name}") for alias in node.names]
    return found


def _part(module: str) -> str:
    """`data` of `tunefork.data.mask`; `__init__` of `tunefork` itself."""
    return [*module.split("."), "__init__"][1]


def _against_the_stream(file: Path, source: str) -> list[str]:
    importer = _part(_name(file))
    if importer in ASIDE:
        return []
    faults = []
    for line, imported in _imported(source):
        part = _part(imported)
        if not imported.startswith("tunefork"):
            continue
        if part not in ORDER or ORDER.index(part) > ORDER.index(importer):
            faults.append(f"{_name(file)}:{line} imports {imported}")
    return faults


def test_every_part_has_a_place() -> None:
    parts = {_part(_name(file)) for file in MODULES}
    assert parts == {*ORDER, *ASIDE}


def test_imports_go_one_way() -> None:
    faults = [f for file in MODULES for f in _against_the_stream(file, file.read_text())]
    assert not faults, "\n".join(faults)


@pytest.mark.parametrize(
    "source",
    [
        "import tunefork.train.loop",
        "from tunefork.train.loop import train",
        "from tunefork import train",
        "def later():\n    from tunefork.train import loop",
        "from tunefork import load_recipe",
        "from tunefork.documentation import PAGES",
    ],
)
def test_an_import_against_the_stream_is_found(source: str) -> None:
    assert _against_the_stream(SOURCE / "model" / "new.py", source)
    assert not _against_the_stream(SOURCE / "model" / "new.py", "from tunefork.data import mask")


def test_no_part_imports_in_a_circle() -> None:
    names = {_name(file) for file in MODULES}
    edges: dict[str, set[str]] = {}
    for file in MODULES:
        direct = {i for _, i in _imported(file.read_text())}
        direct |= {i.rpartition(".")[0] for i in direct}
        edges[_name(file)] = (direct & names) - {_name(file)}
    done: list[str] = []
    while len(done) < len(edges):
        ready = [name for name in edges if name not in done and edges[name] <= set(done)]
        assert ready, f"these import each other in a circle: {sorted(set(edges) - set(done))}"
        done += ready


@pytest.mark.parametrize(
    "run",
    [
        "import tunefork",
        "from tunefork.cli.app import app; app(['--help'], standalone_mode=False)",
        "from tunefork.cli.app import app; app(['compare', '--help'], standalone_mode=False)",
        "from tunefork.cli.app import app; app(['advise', '--help'], standalone_mode=False)",
        "from tunefork.cli.app import app; app(['recipe', 'schema'], standalone_mode=False)",
        "from tunefork.cli.app import app; app(['adapters', 'list'], standalone_mode=False)",
    ],
)
def test_help_imports_nothing_heavy(run: str) -> None:
    heavy = {"torch", "transformers", "numpy", "bitsandbytes", "datasets", "matplotlib"}
    code = f"{run}\nimport sys\nprint('LOADED', sorted({heavy!r} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "LOADED []"
