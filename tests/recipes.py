"""A tiny model's recipe, and its rows, for what trains and compares."""

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from tests.folders import save_model
from tunefork.recipe import Recipe
from tunefork.recipe_file import parse


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny llama's folder."""
    folder = tmp_path_factory.mktemp("base")
    save_model(folder)
    return folder


def rows(count: int, start: int = 0) -> list[dict[str, Any]]:
    """Classification rows in two classes."""
    labels = ("fox", "dog")
    return [{"text": f"colour {n}", "label": labels[n % 2]} for n in range(start, start + count)]


def recipe_in(folder: Path, base: Path, **sections: Any) -> Recipe:
    """A recipe over the tiny model, its rows in `folder`; the sections given are merged into those
    here."""
    for name, given in (("train", rows(12)), ("eval", rows(6, 100))):
        lines = [json.dumps(row) + "\n" for row in given]
        (folder / f"{name}.jsonl").write_text("".join(lines))
    fields: dict[str, Any] = {
        "model": str(base),
        "data": {
            "train": str(folder / "train.jsonl"),
            "eval": str(folder / "eval.jsonl"),
            "max_length": 128,
        },
        "lora": {"rank": 4},
        "train": {"max_steps": 3, "batch_size": 4, "precision": "fp32"},
        "evaluate": {"forgetting": None, "bootstrap_samples": 200},
        "compare": {"search_trials": 1},
    }
    for name, section in sections.items():
        merged = isinstance(section, dict) and name in fields and name != "model"
        fields[name] = fields[name] | section if merged else section
    return parse(fields)


@pytest.fixture
def make_recipe(base: Path, tmp_path: Path) -> Callable[..., Recipe]:
    """`recipe_in` the test's own folder."""
    return partial(recipe_in, tmp_path, base)
