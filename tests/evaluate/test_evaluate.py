"""From a recipe and its data to columns that intervals come from."""

import json
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import tunefork.evaluate.evaluate as evaluate_module
from tests.tiny import tiny_model
from tunefork.data.loader import Data, load_data
from tunefork.errors import DataError, RecipeError, TuneforkError
from tunefork.evaluate.evaluate import (
    FORGETTING,
    check_metrics,
    evaluate,
    load_columns,
    plan_evaluation,
    save_columns,
)
from tunefork.evaluate.statistics import METRICS, estimate, paired_difference
from tunefork.recipe import Recipe
from tunefork.recipe_file import parse

Load = Callable[..., tuple[Recipe, Data]]

LABELS = ["w20", "w20 w21", "w30"]
"""One is the beginning of another; only the end of the turn tells them apart."""

ALL = ["loss", "perplexity", "accuracy", "macro_f1", "exact_match", "rouge_l"]


def _labelled(num_rows: int) -> list[dict[str, Any]]:
    """Every second row has the first label, every sixth the third."""
    chosen = (0, 1, 0, 1, 0, 2)
    words = [f"w{40 + row % 7} w{50 + row % 11} w{60 + row % 5}" for row in range(num_rows)]
    return [{"text": w, "label": LABELS[chosen[row % 6]]} for row, w in enumerate(words)]


TEXTS = [{"text": f"w{row + 4} w{row + 5} w{row + 6} w7"} for row in range(30)]
PROMPTS = [
    {"prompt": f"w{row + 40} w{row + 41}", "completion": f"w{row + 4} w5"} for row in range(20)
]


@pytest.fixture
def load(tokenizer: Any, tmp_path: Path) -> Load:
    """A function of rows and recipe sections: the recipe and its data."""

    def load(
        train: list[dict[str, Any]], eval_rows: list[dict[str, Any]] | None = None, **sections: Any
    ) -> tuple[Recipe, Data]:
        data: dict[str, Any] = {"eval_share": 0.4, "max_length": 48} | sections.pop("data", {})
        for name, rows in (("train", train), ("eval", eval_rows)):
            if rows is not None:
                path = tmp_path / f"{name}.jsonl"
                path.write_text("".join(json.dumps(row) + "\n" for row in rows))
                data[name] = str(path)
        section: dict[str, Any] = {"forgetting": None, "max_new_tokens": 4}
        recipe = parse(
            {
                "model": "none",
                "data": data,
                "train": {"micro_batch_tokens": 256},
                "evaluate": section | sections,
            }
        )
        return recipe, load_data(recipe, tokenizer)

    return load


def test_by_default_labels_are_measured_where_there_are_any(load: Load) -> None:
    assert check_metrics(*load(_labelled(30))) == ("loss", "perplexity", "accuracy", "macro_f1")
    assert check_metrics(*load(TEXTS)) == ("loss", "perplexity")
    assert check_metrics(*load(PROMPTS, metrics=["rouge_l"])) == ("rouge_l",)


@pytest.mark.parametrize(
    ("rows", "metric", "expected"),
    [
        (TEXTS, "accuracy", "accuracy needs labels, .* is text; .*loss, perplexity$"),
        (PROMPTS, "macro_f1", "macro_f1 needs labels, .*exact_match, rouge_l"),
        (TEXTS, "exact_match", "exact_match needs answers, .* is text; .*loss, perplexity$"),
        (TEXTS, "rouge_l", "rouge_l needs answers"),
    ],
)
def test_a_metric_that_the_data_cannot_have_is_refused(
    load: Load, rows: list[dict[str, Any]], metric: str, expected: str
) -> None:
    with pytest.raises(RecipeError, match=rf"evaluate\.metrics: {expected}"):
        check_metrics(*load(rows, metrics=["loss", metric]))


def test_every_column_gives_an_interval(load: Load, tokenizer: Any, tmp_path: Path) -> None:
    general = tmp_path / "general.txt"
    general.write_text("w5 w6 w7\n\nw8 w9 w10 w11\n")
    recipe, data = load(_labelled(50), metrics=ALL, max_generated=5, forgetting=str(general))
    found = evaluate(tiny_model(), tokenizer, data, recipe)
    assert found.metrics == (*ALL, FORGETTING) and set(found.metrics) == set(METRICS)
    assert found.seconds > 0
    num_examples = len(data.eval)
    for name, values in found.columns.items():
        assert np.isfinite(values).all(), name
        generated, general_text = name in ("exact_match", "rouge_l"), name.startswith("forgetting")
        assert len(values) == (5 if generated else 2 if general_text else num_examples), name
    for metric in found.metrics:
        interval = estimate(metric, [found.columns], samples=200)
        assert interval.low <= interval.value <= interval.high, metric
        itself = paired_difference(metric, [found.columns], [found.columns], samples=200)
        assert (itself.value, itself.share_above) == (0, 0.5)


@torch.inference_mode()
def test_labels_and_loss_by_hand(load: Load, tokenizer: Any) -> None:
    recipe, data = load(_labelled(30))
    model = tiny_model()
    columns = evaluate(model, tokenizer, data, recipe).columns
    assert data.labels is not None
    for at, example in enumerate(data.eval_examples):
        scores = []
        for label in data.labels:
            encoded = data.renderer.encode_answer(example, label)
            ids = torch.from_numpy(encoded.input_ids).long()[None]
            losses = torch.nn.functional.cross_entropy(
                model(ids).logits[0, :-1], ids[0, 1:], reduction="none"
            )
            scores.append(-float(losses[torch.from_numpy(encoded.supervised[1:])].sum()))
        assert columns["predicted"][at] == int(np.argmax(scores))
        gold = data.labels.index(example.label or "")
        assert columns["gold"][at] == gold
        assert columns["loss_sum"][at] == pytest.approx(-scores[gold], abs=1e-3)
        assert columns["tokens"][at] == len(LABELS[gold].split()) + 1


def test_one_example_and_a_label_that_it_lacks(load: Load, tokenizer: Any) -> None:
    eval_rows = [{"text": "w90 w91", "label": LABELS[1]}]
    recipe, data = load(_labelled(30), eval_rows)
    found = evaluate(tiny_model(), tokenizer, data, recipe)
    assert data.labels == tuple(LABELS) and found.columns["gold"].tolist() == [1]
    for metric in found.metrics:
        interval = estimate(metric, [found.columns], samples=200)
        assert interval.low <= interval.value <= interval.high


def test_the_majority_is_that_of_the_training_data(load: Load, tokenizer: Any) -> None:
    eval_rows = [{"text": f"w90 w{row}", "label": LABELS[1]} for row in (4, 5, 6)]
    eval_rows += [{"text": "w91 w4", "label": LABELS[0]}]
    recipe, data = load(_labelled(30), eval_rows)
    assert Counter(example.label for example in data.train).most_common(1)[0][0] == LABELS[0]
    assert evaluate(tiny_model(), tokenizer, data, recipe).majority_share == 1 / 4
    recipe, data = load(TEXTS)
    assert evaluate(tiny_model(), tokenizer, data, recipe).majority_share is None


def test_examples_cut_before_their_answer_are_not_generated_for(load: Load, tokenizer: Any) -> None:
    recipe, data = load(PROMPTS, metrics=["exact_match"])
    gone = [replace(example, prompt_length=0, answer=None) for example in data.eval]
    some = replace(data, eval=[gone[0], *data.eval[1:]])
    columns = evaluate(tiny_model(), tokenizer, some, recipe).columns
    assert len(columns["exact_match"]) == len(data.eval) - 1
    with pytest.raises(DataError, match=r"data\.max_length: 48 cuts the last answer"):
        evaluate(tiny_model(), tokenizer, replace(data, eval=gone), recipe)


def test_what_no_model_could_be_measured_by_is_found_without_one(
    load: Load, tokenizer: Any, tmp_path: Path
) -> None:
    recipe, data = load(_labelled(30))
    plan = plan_evaluation(recipe, data, tokenizer)
    assert plan.answers is not None and len(plan.answers) == len(LABELS)
    assert (plan.generated, plan.passages) == ([], [])
    cut = replace(
        data.eval[0],
        input_ids=data.eval[0].input_ids[:-1],
        supervised=data.eval[0].supervised[:-1],
    )
    with pytest.raises(DataError, match=rf"{cut.source}: its answer is cut by data\.max_length"):
        plan_evaluation(recipe, replace(data, eval=[*data.eval[1:], cut]), tokenizer)

    recipe, data = load(PROMPTS, metrics=["exact_match"], max_generated=3)
    assert len(plan_evaluation(recipe, data, tokenizer).generated) == 3
    gone = [replace(example, prompt_length=0, answer=None) for example in data.eval]
    with pytest.raises(DataError, match=r"data\.max_length: 48 cuts the last answer"):
        plan_evaluation(recipe, replace(data, eval=gone), tokenizer)

    recipe, data = load(TEXTS, forgetting=str(tmp_path / "gone.txt"))
    with pytest.raises(DataError, match=r"evaluate\.forgetting: .*gone\.txt: cannot be read"):
        plan_evaluation(recipe, data, tokenizer)


def test_a_broken_model_is_not_a_result(load: Load, tokenizer: Any) -> None:
    recipe, data = load(_labelled(30))
    model = tiny_model()
    model.get_input_embeddings().weight.data[5:] = float("nan")
    with pytest.raises(TuneforkError, match="loss_sum is not finite"):
        evaluate(model, tokenizer, data, recipe)


def test_columns_come_back_as_they_were(load: Load, tokenizer: Any, tmp_path: Path) -> None:
    recipe, data = load(_labelled(30))
    columns = evaluate(tiny_model(), tokenizer, data, recipe).columns
    save_columns(columns, tmp_path / "columns.npz")
    back = load_columns(tmp_path / "columns.npz")
    assert back.keys() == columns.keys()
    for name, values in columns.items():
        assert back[name].dtype == values.dtype and back[name].tolist() == values.tolist()


def test_a_documents_sequences_are_one_draw() -> None:
    columns = {"loss_sum": np.arange(45.0), "tokens": np.full(45, 2)}
    sources = [f"t:{at // 2}" for at in range(45)]
    summed = evaluate_module._by_document(columns, sources)
    assert len(summed["loss_sum"]) == 23 and sorted(summed["tokens"]) == [2] + [4] * 22
    assert summed["loss_sum"].sum() == columns["loss_sum"].sum()
    few = evaluate_module._by_document(columns, [f"t:{at % 3}" for at in range(45)])
    assert few is columns
