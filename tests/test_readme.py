"""What the README shows is what was measured, and what it and the examples name is there."""

from pathlib import Path

import pytest

from tunefork.advise.situation import load_situation
from tunefork.compare.comparison import Comparison
from tunefork.compare.table import markdown_table
from tunefork.recipe_file import load

ROOT = Path(__file__).parent.parent
DOCS = sorted(f"docs/{file.name}" for file in (ROOT / "docs").glob("*.md"))
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_table_is_the_demos() -> None:
    raw = ROOT / "examples" / "results" / "01_route_requests.json"
    comparison = Comparison.model_validate_json(raw.read_text(encoding="utf-8"))
    assert markdown_table(comparison) in README
    words = " ".join(line.removeprefix("> ") for line in README.splitlines())
    for sentence in (
        "Choose QLoRA.",
        "It forgets more: on general text its loss rose by 1.75 nats a token,",
        "of another size.",
        "variance of training is unmeasured",
    ):
        assert sentence in comparison.verdict.text and sentence in words.replace("**", "")


@pytest.mark.parametrize("page", ["README.md", "CONTRIBUTING.md", "examples/README.md", *DOCS])
def test_links_lead_somewhere(page: str) -> None:
    text = (ROOT / page).read_text(encoding="utf-8")
    for target in (part.partition(")")[0] for part in text.split("](")[1:]):
        is_there = (ROOT / page).parent.joinpath(target.partition("#")[0]).exists()
        assert is_there or target.startswith(("http", "#")), target


def test_every_example_loads_and_is_explained() -> None:
    recipes = sorted((ROOT / "examples").glob("*.yaml"))
    situations = sorted((ROOT / "examples" / "situations").glob("*.yaml"))
    assert [load(file).model.id for file in recipes] == ["smollm2-135m-instruct"] * 4
    assert [load_situation(file, {}).task for file in situations][-1] == "distillation"
    explained = (ROOT / "examples" / "README.md").read_text(encoding="utf-8")
    assert all(f"{file.name}](" in explained for file in [*recipes, *situations])
