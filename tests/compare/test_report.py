import re
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from tests.compare.fabricated import ACCURACIES, fabricate
from tests.page.parser import Page
from tunefork.compare.report import report_html, write_report

CASES: dict[str, dict[str, Any]] = {
    "demo": {},
    "one failed": {"failed": {"qlora": "out of memory"}},
    "all failed": {"failed": dict.fromkeys(ACCURACIES, "killed")},
    "base failed": {"failed": {"base": "killed"}},
    "three seeds": {"seeds": (0, 1, 2)},
    "no labels, price or forgetting": {
        "has_labels": False,
        "usd_per_hour": None,
        "has_forgetting": False,
    },
    "one method": {"accuracies": {"base": 0.2, "full": 0.8}},
    "markup": {
        "model_id": "<script>alert(1)</script>&amp;\"'",
        "failed": {"full": "<img src=http://example.com/x onerror=alert(2)>"},
    },
}


@cache
def html_of(case: str) -> str:
    """The report of one of CASES; drawing is what takes the time."""
    return report_html(fabricate(**CASES[case]))


@pytest.fixture(scope="module", params=CASES)
def page(request: pytest.FixtureRequest) -> Page:
    return Page(html_of(request.param))


@pytest.fixture
def undrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where only the text is of interest."""
    monkeypatch.setattr("tunefork.compare.report.drawings", lambda _: [])


def test_page_is_well_formed_and_its_ids_are_unique_and_resolved(page: Page) -> None:
    assert page.open == []
    assert len(page.ids) == len(set(page.ids))
    assert set(page.used) <= set(page.ids)


def test_page_needs_nothing_from_outside_and_no_script(page: Page) -> None:
    for tag, attributes in page.tags:
        assert tag not in {"script", "link", "img", "iframe", "object", "embed"}
        assert not any(name.startswith("on") or name == "src" for name in attributes)
        assert not any("//" in (value or "") for value in attributes.values())
        assert (attributes.get("href") or "#").startswith("#")


def test_page_is_accessible(page: Page) -> None:
    assert ("html", {"lang": "en"}) in page.tags
    assert sum(tag == "h1" for tag, _ in page.tags) == 1
    assert all("scope" in attributes for tag, attributes in page.tags if tag == "th")
    for tag, attributes in page.tags:
        if tag == "svg":
            assert attributes["role"] == "img" and len(attributes["aria-label"] or "") > 20


def test_page_says_verdict_table_rules_data_and_recipe() -> None:
    text = " ".join(Page(html_of("demo")).text.split())
    text = text.replace("\N{NO-BREAK SPACE}", " ")
    for words in (
        "Choose LoRA",
        "95 % interval -1.3 to 2.9",
        "About 1,800 evaluation examples",
        "Does not hold here: full takes 1.5 times as much as LoRA, 1.6 times as much as QLoRA.",
        "Not measurable here: full is 14 times as big",
        "full minus LoRA +0.8 points -1.3 to +2.9",
        "960 (118.4k tokens)",
        "right 14.2 % of the time",
        "AMD EPYC 9R14, 2 threads",
        "lora/seed-0/adapter",
        "train: requests.jsonl",
    ):
        assert words in text


def test_figures_are_those_that_there_is_data_for() -> None:
    def titles(html: str) -> list[str]:
        return re.findall(r"<figure>\s*<h3>([^<]+)", html)

    assert titles(html_of("demo")) == [
        "Method against method",
        "Against the untouched base",
        "Training loss",
        "Search of the learning rate",
        "Forgetting",
    ]
    assert "Forgetting" not in titles(report_html(fabricate(has_forgetting=False)))
    assert titles(html_of("all failed")) == []


def test_figures_take_their_colours_and_fonts_from_the_page() -> None:
    html = html_of("demo")
    for svg in re.findall(r"<svg.*?</svg>", html, flags=re.DOTALL):
        assert "#0" not in re.sub(r'(href="|url\()#', "", svg)
        assert "font-family" not in svg and "DejaVu" not in svg and "<style" not in svg
        assert "var(--" in svg


def test_markup_in_names_and_errors_is_shown_as_text() -> None:
    html = html_of("markup")
    assert "<script" not in html and "<img" not in html
    assert "<script>alert(1)</script>" in Page(html).text


def test_same_comparison_gives_the_same_bytes(tmp_path: Path) -> None:
    comparison = fabricate(seeds=(0, 1, 2))
    for name in ("a.html", "b.html"):
        write_report(comparison, tmp_path / name)
    a, b = ((tmp_path / name).read_bytes() for name in ("a.html", "b.html"))
    assert a == b and len(a) < 150_000


def test_report_and_table_do_not_wait_for_torch() -> None:
    code = (
        "import sys, tunefork.compare.report, tunefork.compare.table\n"
        "sys.exit(bool({'torch', 'transformers'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("made", "said"),
    [
        ({"seeds": (0,)}, "leave the variance of training out, which takes 3 seeds"),
        ({"seeds": (0, 1)}, "leave the variance of training out, which takes 3 seeds"),
        ({"seeds": (0, 1, 2)}, "and over training seeds"),
        ({"seeds": (0, 1, 2), "paired_seeds": (1,)}, "leave the variance of training out"),
    ],
)
def test_report_says_what_the_intervals_cover(
    made: dict[str, Any], said: str, undrawn: None
) -> None:
    assert said in " ".join(Page(report_html(fabricate(**made))).text.split())


def test_report_says_on_how_many_examples_a_metric_was_measured(undrawn: None) -> None:
    assert "measured on 24 documents" in report_html(fabricate(has_labels=False, examples=24))
    assert "measured on 400" not in report_html(fabricate(examples=400))
