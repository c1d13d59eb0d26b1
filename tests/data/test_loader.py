from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from tunefork.data.loader import Data, load_data
from tunefork.errors import DataError
from tunefork.recipe import Recipe

Write = Callable[..., str]
Make = Callable[..., Recipe]

LABELS = ["fox", "dog"]


def rows(count: int, start: int = 0) -> list[dict[str, Any]]:
    return [{"text": f"animal {n}", "label": LABELS[n % 2]} for n in range(start, start + count)]


def sources(data: Data) -> tuple[list[str], list[str]]:
    return [e.source for e in data.train], [e.source for e in data.eval]


def test_classification(write_rows: Write, make_recipe: Make, tokenizer: Any) -> None:
    recipe = make_recipe(
        train=write_rows(rows(20)), eval=write_rows(rows(10, start=20), "eval.jsonl")
    )
    data = load_data(recipe, tokenizer)
    assert (data.format, data.labels) == ("classification", ("dog", "fox"))
    assert (len(data.train), len(data.eval)) == (20, 10)
    first = data.train[0]
    assert (first.source, first.label, first.answer) == ("train.jsonl:1", "fox", "fox")
    text = tokenizer.decode(first.input_ids)
    assert "Classify the text. Answer with one of: dog, fox.\n\nanimal 0<|im_end|>" in text
    supervised = first.input_ids[first.supervised]
    assert tokenizer.decode(supervised) == "fox<|im_end|>"
    other = data.renderer.encode_answer(data.eval_examples[0], "dog")
    prompt = data.eval[0].input_ids[: data.eval[0].prompt_length]
    assert np.array_equal(other.input_ids[: other.prompt_length], prompt)
    report = data.report
    assert report.train.labels == {"dog": 10, "fox": 10}
    assert report.train.majority_share == 0.5
    assert report.train.num_tokens == sum(len(e.input_ids) for e in data.train)
    assert report.errors == report.warnings == ()


def test_instruction_system_and_plain_cue(
    write_rows: Write, make_recipe: Make, tokenizer: Any
) -> None:
    path = write_rows(rows(10))
    recipe = make_recipe(train=path, instruction="Which?", system="Be brief", template="plain")
    data = load_data(recipe, tokenizer)
    text = tokenizer.decode(data.train[0].input_ids)
    assert text.startswith("Be brief\n\nWhich?\n\nanimal ")
    assert text.endswith(("\n\nLabel: fox<|im_end|>", "\n\nLabel: dog<|im_end|>"))
    assert data.report.template == "plain"


def test_bad_rows_are_reported_at_once(
    write_rows: Write, make_recipe: Make, tokenizer: Any
) -> None:
    bad = ["secret", {"text": "", "label": "fox"}, {"label": "fox"}]
    train = write_rows([*rows(10), *bad])
    evaluation = write_rows([*rows(2, start=50), {"text": "secret"}], "eval.jsonl")
    with pytest.raises(DataError) as caught:
        load_data(make_recipe(train=train, eval=evaluation), tokenizer)
    message = str(caught.value)
    assert "4 of 16 rows cannot be used; mend them, or set data.bad_rows: drop" in message
    for source in ("train.jsonl:11", "train.jsonl:12", "train.jsonl:13", "eval.jsonl:3"):
        assert f"\n  {source}: " in message
    assert "secret" not in message
    data = load_data(make_recipe(train=train, eval=evaluation, bad_rows="drop"), tokenizer)
    assert (len(data.train), len(data.eval)) == (10, 2)
    assert len(data.report.problems) == 4
    assert "4 of 16 rows cannot be used and are left out" in "\n".join(data.report.warnings)


def test_the_list_of_bad_rows_is_capped(
    write_rows: Write, make_recipe: Make, tokenizer: Any
) -> None:
    recipe = make_recipe(train=write_rows(rows(2) + [{"text": "x"}] * 50))
    with pytest.raises(DataError) as caught:
        load_data(recipe, tokenizer)
    message = str(caught.value)
    assert message.count("train.jsonl:") == 20
    assert "50 of 52 rows" in message and "... and 30 more" in message


def test_eval_is_cut_off_by_content(write_rows: Write, make_recipe: Make, tokenizer: Any) -> None:
    data = load_data(make_recipe(train=write_rows(rows(40)), eval_share=0.25), tokenizer)
    train, held = sources(data)
    assert (len(train), len(held)) == (30, 10)
    assert not set(train) & set(held)
    texts = {e.answer or "" for e in data.eval} | {e.answer or "" for e in data.train}
    assert texts == {"fox", "dog"}
    reordered = load_data(make_recipe(train=write_rows(rows(40)[::-1]), eval_share=0.25), tokenizer)
    assert sorted(e.input_ids.tobytes() for e in reordered.eval) == sorted(
        e.input_ids.tobytes() for e in data.eval
    )


def test_overlap(write_rows: Write, make_recipe: Make, tokenizer: Any) -> None:
    train = write_rows([*rows(10), {"text": "animal  3 ", "label": "dog"}])
    held = [{"text": " animal\n3", "label": "dog"}, *rows(3, start=20)]
    fields = {"train": train, "eval": write_rows(held, "eval.jsonl")}
    with pytest.raises(DataError, match=r"1 of 4 .*data.overlap: drop") as caught:
        load_data(make_recipe(**fields), tokenizer)
    assert "eval.jsonl:1 is train.jsonl:" in str(caught.value)
    assert "animal" not in str(caught.value)
    data = load_data(make_recipe(**fields, overlap="drop"), tokenizer)
    assert (len(data.train), len(data.eval), data.report.overlap) == (9, 4, 1)
    assert "2 training examples are left out" in data.report.warnings[0]


def test_same_prompt_with_another_answer_is_a_warning(
    write_rows: Write, make_recipe: Make, tokenizer: Any
) -> None:
    held = write_rows([{"text": "animal 3", "label": "fox"}], "eval.jsonl")
    data = load_data(make_recipe(train=write_rows(rows(6)), eval=held), tokenizer)
    assert "1 evaluation examples have the prompt of a training example" in data.report.warnings[0]


def test_labels(write_rows: Write, make_recipe: Make, tokenizer: Any) -> None:
    train = write_rows(rows(6))
    held = write_rows([{"text": "tiny", "label": "ant"}], "eval.jsonl")
    with pytest.raises(DataError, match="a label that no training example has") as caught:
        load_data(make_recipe(train=train, eval=held), tokenizer)
    assert "eval.jsonl:1" in str(caught.value) and "ant" not in str(caught.value).split(":")[-1]
    named = make_recipe(train=train, eval=held, labels=["fox", "dog", "ant"])
    data = load_data(named, tokenizer)
    assert data.labels == ("fox", "dog", "ant")
    assert "never trained on" in data.report.warnings[0]
    with pytest.raises(
        DataError, match=r"train.jsonl:2: its label is none of the 1 in data.labels"
    ):
        load_data(make_recipe(train=train, labels=["fox"]), tokenizer)


def test_too_long(write_rows: Write, make_recipe: Make, tokenizer: Any) -> None:
    turns = [
        {"role": "user", "content": "hello"},
        {"role": "assistant", "content": "yes " * 30},
    ]
    long_prompt = [{"role": "user", "content": "hello " * 40}, turns[1]]
    short = [
        [{"role": "user", "content": f"hello {n}"}, turns[1] | {"content": "yes"}] for n in "ab"
    ]
    train = write_rows([{"messages": m} for m in (turns, long_prompt, short[0])])
    held = write_rows([{"messages": short[1]}], "eval.jsonl")
    fields = {"train": train, "eval": held, "max_length": 64}
    with pytest.raises(DataError, match=r"2 rows are too long; raise data\.max_length") as caught:
        load_data(make_recipe(**fields), tokenizer)
    assert "train.jsonl:1: has " in str(caught.value)
    data = load_data(make_recipe(**fields, too_long="drop"), tokenizer)
    assert sources(data)[0] == ["train.jsonl:3"]
    assert (data.report.train.num_dropped, data.report.train.num_cut) == (2, 0)
    data = load_data(make_recipe(**fields, too_long="cut"), tokenizer)
    assert sources(data)[0] == ["train.jsonl:1", "train.jsonl:3"]
    assert len(data.train[0].input_ids) == 64
    assert (data.report.train.num_dropped, data.report.train.num_cut) == (1, 1)
    assert len(data.report.warnings) == 2


def test_text_is_split_into_windows(write_rows: Write, make_recipe: Make, tokenizer: Any) -> None:
    documents = [{"text": "the quick brown fox " * n} for n in (1, 10, 20, 30)]
    data = load_data(make_recipe(train=write_rows(documents), max_length=16), tokenizer)
    assert (data.format, data.labels, data.report.template) == ("text", None, "none")
    assert data.report.train.num_examples + data.report.eval.num_examples == 4
    assert all(len(sequence.input_ids) <= 16 for sequence in data.train)
    for source in set(sources(data)[0]):
        ids = np.concatenate([e.input_ids for e in data.train if e.source == source])
        line = int(source.rpartition(":")[2])
        expected = tokenizer(documents[line - 1]["text"])["input_ids"]
        assert ids.tolist() == [*expected, tokenizer.eos_token_id]


def test_limits_take_a_seeded_subset(write_rows: Write, make_recipe: Make, tokenizer: Any) -> None:
    def chosen(seed: int, **limits: int) -> tuple[list[str], list[str]]:
        path = write_rows(rows(40))
        recipe = make_recipe({"seed": seed}, train=path, eval_share=0.5, **limits)
        return sources(load_data(recipe, tokenizer))

    train, held = chosen(0, max_train_examples=5, max_eval_examples=4)
    assert (len(train), len(held)) == (5, 4)
    assert chosen(0, max_train_examples=5, max_eval_examples=4) == (train, held)
    assert chosen(1, max_train_examples=5, max_eval_examples=4) != (train, held)
    everything = chosen(0)
    assert set(train) < set(everything[0]) and set(held) < set(everything[1])


def test_an_empty_evaluation_split(write_rows: Write, make_recipe: Make, tokenizer: Any) -> None:
    recipe = make_recipe(train=write_rows(rows(4)), eval_share=0.0)
    with pytest.raises(DataError, match="no example is left to evaluate on"):
        load_data(recipe, tokenizer)
    assert len(load_data(recipe, tokenizer, need_eval=False).train) == 4


def test_an_empty_training_split(write_rows: Write, make_recipe: Make, tokenizer: Any) -> None:
    recipe = make_recipe(train=write_rows(rows(1)), eval_share=0.5)
    with pytest.raises(DataError, match="leaves no example to train on"):
        load_data(recipe, tokenizer)


def test_template_failures_are_bad_rows(
    write_rows: Write, make_recipe: Make, make_tokenizer: Callable[..., Any]
) -> None:
    template = "{% if messages|length > 2 %}{{ raise_exception('too many turns') }}{% endif %}"
    template += "{% for m in messages %}{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    template += "{% if add_generation_prompt %}assistant\n{% endif %}"
    question, answer = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}
    other = {"role": "user", "content": "other"}
    conversations = [[question, answer], [question, answer, question, answer], [other, answer]]
    recipe = make_recipe(train=write_rows([{"messages": turns} for turns in conversations]))
    with pytest.raises(DataError, match=r"1 of 3 rows") as caught:
        load_data(recipe, make_tokenizer(template))
    assert "train.jsonl:2: the chat template refuses" in str(caught.value)
    assert "too many turns" in str(caught.value)


def test_all_supervised_is_an_error(
    write_rows: Write, make_recipe: Make, make_tokenizer: Callable[..., Any]
) -> None:
    template = (
        "{% for m in messages if m.role == 'assistant' %}{{ m.content }}<|im_end|>{% endfor %}"
    )
    with pytest.raises(DataError, match="every token is supervised, prompts included"):
        load_data(make_recipe(train=write_rows(rows(9))), make_tokenizer(template))


def test_a_template_without_an_end_of_turn_is_a_warning(
    write_rows: Write, make_recipe: Make, make_tokenizer: Callable[..., Any]
) -> None:
    template = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    template += "{% if add_generation_prompt %}assistant:{% endif %}"
    data = load_data(make_recipe(train=write_rows(rows(9))), make_tokenizer(template))
    assert "cannot learn to stop" in data.report.warnings[-1]


@pytest.mark.parametrize(
    ("row", "options", "said"),
    [
        ({"text": "x"}, {"instruction": "Which?"}, "data.instruction: is for classification"),
        ({"text": "x"}, {"labels": ["a"]}, "data.labels: is for classification"),
        ({"text": "x"}, {"system": "S"}, "data.system: plain text has no turns"),
        ({"text": "x"}, {"template": "chat"}, "data.template: plain text has no turns"),
        ({"text": "x"}, {"supervise": "last"}, "data.supervise: plain text has no turns"),
        ({"text": "x"}, {"columns": {"txet": "text"}}, r"data.columns.txet: .*did you mean 'text'"),
        ({"secret": "x"}, {}, r"train.jsonl: no row has the fields of a known format"),
        ({"body": "x"}, {"format": "text"}, "train.jsonl:1: the field 'text' is missing"),
    ],
)
def test_options_are_honoured_or_refused(
    write_rows: Write,
    make_recipe: Make,
    tokenizer: Any,
    row: dict[str, str],
    options: dict[str, Any],
    said: str,
) -> None:
    with pytest.raises(DataError, match=said) as caught:
        load_data(make_recipe(train=write_rows([row] * 3), **options), tokenizer)
    assert "secret" not in str(caught.value)


def test_columns_rename(write_rows: Write, make_recipe: Make, tokenizer: Any) -> None:
    renamed = [{"body": row["text"], "kind": row["label"]} for row in rows(10)]
    columns = {"text": "body", "label": "kind"}
    data = load_data(make_recipe(train=write_rows(renamed), columns=columns), tokenizer)
    assert data.format == "classification"
