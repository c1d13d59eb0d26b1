import io
from pathlib import Path

from rich.console import Console

from tests.compare.fabricated import fabricate
from tunefork.compare.comparison import Comparison
from tunefork.compare.table import markdown_table, measured_rows, print_comparison


def _printed(comparison: Comparison) -> str:
    stream = io.StringIO()
    print_comparison(comparison, Path("runs/demo/report.html"), Console(file=stream))
    return stream.getvalue()


def test_plain_output_reads_in_100_columns_without_colour() -> None:
    text = _printed(fabricate())
    assert "\x1b" not in text and "…" not in text
    assert max(len(line) for line in text.splitlines()) <= 100
    for word in (
        "base",
        "LoRA",
        "QLoRA",
        "full",
        "3.50 %",
        "2.91 GB",
        "19.6 MB",
        "3e-4",
        "$0.0062",
    ):
        assert word in text
    assert "84.2 to 90.2" in text and "+0.041" in text
    assert "Choose LoRA. No method is detectably better" in text
    assert text.rstrip().endswith("Report: runs/demo/report.html")


def test_a_failed_method_has_a_status_and_no_figures() -> None:
    comparison = fabricate(failed={"qlora": "out of memory"})
    rows = {row.key: row.cells for row in measured_rows(comparison)}
    assert rows["status"]["qlora"].figure == "failed"
    assert {cells["qlora"].figure for key, cells in rows.items() if key != "status"} == {"-"}
    assert "status" not in {row.key for row in measured_rows(fabricate())}


def test_rows_without_a_figure_are_left_out() -> None:
    comparison = fabricate(usd_per_hour=None, has_forgetting=False, has_labels=False)
    keys = {row.key for row in measured_rows(comparison)}
    assert not keys & {"cost", "forgetting", "metric:accuracy"} and "metric:loss" in keys


def test_markup_of_rich_in_a_name_is_shown_as_it_is() -> None:
    assert "[bold]model[/bold]" in _printed(fabricate(model_id="[bold]model[/bold]"))


def test_markdown_has_a_line_a_figure() -> None:
    lines = markdown_table(fabricate()).splitlines()
    assert lines[:2] == ["|  | base | LoRA | QLoRA | full |", "| --- | ---: | ---: | ---: | ---: |"]
    accuracy = next(line for line in lines if line.startswith("| accuracy"))
    assert "| 87.2 % (84.2 to 90.2) |" in accuracy
    assert {line.count("|") for line in lines} == {6}
