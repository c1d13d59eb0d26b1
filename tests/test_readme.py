"""What the README shows is what was measured."""

from pathlib import Path

from tunefork.compare.comparison import Comparison
from tunefork.compare.table import markdown_table

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_table_is_the_demos() -> None:
    raw = ROOT / "examples" / "results" / "01_route_requests.json"
    comparison = Comparison.model_validate_json(raw.read_text(encoding="utf-8"))
    assert markdown_table(comparison) in README
    words = " ".join(line.removeprefix("> ") for line in README.splitlines())
    for sentence in (
        "Choose full fine-tuning.",
        "of another size.",
        "variance of training is unmeasured",
    ):
        assert sentence in comparison.verdict.text and sentence in words


def test_its_links_lead_somewhere() -> None:
    targets = [part.partition(")")[0] for part in README.split("](")[1:]]
    assert targets
    for target in targets:
        assert target.startswith("http") or (ROOT / target).exists(), target
