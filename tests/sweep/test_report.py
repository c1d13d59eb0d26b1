"""The page and the Markdown of a sweep that was never trained."""

from typing import Any

import pytest
from rich.console import Console

from tests.page.parser import Page
from tests.sweep.fabricated import JUDGE, RATES, runs
from tunefork.page.estimate import Estimate
from tunefork.sweep.effects import knob_effects, rank_effect, rate_effect
from tunefork.sweep.markdown import sweep_markdown
from tunefork.sweep.ranking import choose, configurations
from tunefork.sweep.recommend import recommend
from tunefork.sweep.report import report_html
from tunefork.sweep.result import SweepResult
from tunefork.sweep.table import print_sweep


def fabricate(**options: Any) -> SweepResult:
    """A sweep's result."""
    found = runs(lambda rank, rate: 1.0 + 0.1 / rank + 200 * abs(rate - 1e-3), **options)
    chosen = choose(found)
    ranked = configurations(found, JUDGE, chosen)
    return SweepResult(
        tunefork_version="0.0",
        created="2026-11-26T00:00:00+00:00",
        model_id="<b>m</b>",
        method="lora",
        recipe={"model": {"id": "<b>m</b>"}},
        primary_metric="loss",
        margin=0.01,
        train_examples=100,
        validation_examples=10,
        eval_examples=300,
        base_metrics={"loss": Estimate(value=2.0, low=1.9, high=2.1)},
        majority_share=None,
        variants=tuple(run.result for run in found),
        configurations=tuple(ranked),
        chosen=chosen,
        recommended=None if chosen is None else recommend(found, JUDGE, chosen),
        rank_effect=None if chosen is None else rank_effect(found, JUDGE, chosen),
        rate_effect=None if chosen is None else rate_effect(found, JUDGE),
        knobs=tuple(knob_effects(found, JUDGE)),
        together=12,
        wall_s=100.0,
        tokens_per_s=12345.0,
        peak_memory_bytes=10**9,
        device={"name": "a GPU", "memory_bytes": 10**11},
        versions={"torch": "2.0"},
    )


CASES: dict[str, dict[str, Any]] = {
    "whole": {},
    "one seed": {"seeds": (0,)},
    "one rank": {"ranks": (4,)},
    "dropped": {"dropped": lambda rank, rate: rate == RATES[0]},
    "all dropped": {"dropped": lambda rank, rate: True},
}


@pytest.mark.parametrize("case", CASES)
def test_the_page_is_whole_and_needs_nothing_from_outside(case: str) -> None:
    page = Page(report_html(fabricate(**CASES[case])))
    assert page.open == [] and len(page.ids) == len(set(page.ids))
    assert set(page.used) <= set(page.ids)
    for tag, attributes in page.tags:
        assert tag not in {"script", "link", "img", "iframe", "object", "embed", "b"}
        assert not any(name.startswith("on") or name == "src" for name in attributes)
        if tag == "svg":
            assert attributes["role"] == "img" and len(attributes["aria-label"] or "") > 20
    assert sum(tag == "h1" for tag, _ in page.tags) == 1


def test_the_page_and_the_markdown_say_the_same(capsys: pytest.CaptureFixture[str]) -> None:
    result = fabricate()
    page = Page(report_html(result)).text.replace("\N{NO-BREAK SPACE}", " ")
    markdown = sweep_markdown(result, "tunefork sweep x.yaml")
    print_sweep(result, None, Console(width=200))
    said = capsys.readouterr().out
    for words in (
        "Recommended: rank 16 (r16-lr0.001)",
        "Rank mattered: each at its own best setting, rank 16 (lowest validation loss)",
        "The best learning rate did not move with rank: 1e-3 for all",
        "untouched base",
        "chosen by the loss on 10 validation examples",
    ):
        assert words in page and words in markdown and words in said, words
    assert "    tunefork sweep x.yaml" in markdown
    rows = [line for line in markdown.splitlines() if line.startswith("| 1 | r16")]
    assert len(rows) == 1 and "| r16-lr0.001 |" in rows[0] and "| chosen |" in rows[0]


def test_a_narrow_terminal_goes_without_some_columns(capsys: pytest.CaptureFixture[str]) -> None:
    print_sweep(fabricate(), None, Console(width=100))
    table = capsys.readouterr().out.split("\n\n")[0].splitlines()
    assert "against the chosen" in table[0] and "parameters" not in table[0]
    assert len(table) == 6  # a line a configuration, the head, the base
    assert "r16-lr0.001" in table[1] and "1.0" in table[1]


def test_figures_of_ranks_costs_and_rates_are_there() -> None:
    page = report_html(fabricate())
    for title in (
        "Loss and parameters",
        "Loss and time",
        "Each rank at its best setting, against rank 16",
        "Validation loss by learning rate and rank",
    ):
        assert f"<h3>{title}</h3>" in page
    assert "Loss and forgetting" not in page  # none was measured
    assert "var(--series-1)" in page and "#08080" not in page


def test_where_nothing_came_to_its_end_that_is_said() -> None:
    text = sweep_markdown(fabricate(dropped=lambda rank, rate: True))
    assert "No variant came to its end" in text and "dropped" in text
