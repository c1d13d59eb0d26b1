import json
from collections.abc import Callable
from typing import Any

from tunefork.data.check import check, render_report
from tunefork.recipe import Recipe

Write = Callable[..., str]
Make = Callable[..., Recipe]


def test_everything_wrong_is_reported_and_nothing_raised(
    write_rows: Write, make_recipe: Make, tokenizer: Any
) -> None:
    good = [{"text": f"animal {n}", "label": "fox" if n % 3 else "dog"} for n in range(9)]
    long_row = {"text": "word " * 100, "label": "dog"}
    train = write_rows([*good, good[0], long_row] + ["secret"] * 30)
    held = write_rows([good[1], {"text": "new", "label": "dog"}], "eval.jsonl")
    recipe = make_recipe(train=train, eval=held, max_length=90, max_train_examples=3)
    report = check(recipe, tokenizer)
    assert len(report.errors) == 3  # overlap, too long, bad rows
    assert (report.train.num_rows, report.train.num_examples) == (41, 10)
    assert (report.train.duplicates, report.train.num_dropped, report.overlap) == (1, 1, 1)
    assert report.train.labels == {"fox": 6, "dog": 4}
    assert report.train.majority_share == 0.6
    lengths = report.train.length_quantiles
    assert list(lengths) == ["min", "p50", "p90", "p99", "max"]
    assert lengths["min"] <= lengths["p50"] <= lengths["max"] <= 90

    text = render_report(report)
    assert all(f"train.jsonl:{line}: is not JSON" in text for line in range(12, 42))
    assert "supervised" in text and "duplicates 1" in text and "most frequent: 60.0%" in text
    assert "error: data.eval: 1 of 2 evaluation examples are training examples" in text
    assert "secret" not in text

    fields = json.loads(json.dumps(report.as_dict()))
    assert fields["train"]["majority_share"] == 0.6
    assert 0 < fields["train"]["supervised_share"] < 0.5
    assert fields["problems"][0] == {
        "source": "train.jsonl:12",
        "what": report.problems[0].what,
        "kind": "unreadable or incomplete",
    }


def test_good_data_has_no_errors(write_rows: Write, make_recipe: Make, tokenizer: Any) -> None:
    report = check(make_recipe(train=write_rows([{"text": f"a {n}"} for n in range(9)])), tokenizer)
    assert report.errors == () and report.train.majority_share is None
    assert "error: " not in render_report(report)
