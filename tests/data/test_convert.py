from typing import Any

import pytest

from tunefork.data.convert import (
    add_instruction,
    convert,
    default_instruction,
    detect,
    rename,
)
from tunefork.data.example import Example, Message, Row, RowProblem

TURNS = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]


def converted(fields: dict[str, Any], format: str, **options: Any) -> Example:
    example = convert(Row("f:1", fields), format, **options)
    assert isinstance(example, Example), example
    return example


def problem(fields: dict[str, Any], format: str) -> str:
    found = convert(Row("f:1", fields), format)
    assert isinstance(found, RowProblem), found
    assert found.source == "f:1"
    return found.what


def turns(example: Example) -> list[tuple[str, str]]:
    return [(message.role, message.content) for message in example.messages]


@pytest.mark.parametrize(
    ("fields", "format"),
    [
        ({"messages": TURNS, "text": "x"}, "messages"),
        ({"conversations": []}, "sharegpt"),
        ({"instruction": "x", "output": "y", "text": "z"}, "alpaca"),
        ({"prompt": "x", "completion": "y"}, "prompt_completion"),
        ({"text": "x", "label": 0}, "classification"),
        ({"text": "x", "label": None}, "classification"),
        ({"words": "x"}, None),
    ],
)
def test_detect(fields: dict[str, Any], format: str | None) -> None:
    assert detect(fields) == format


def test_messages_keep_their_turns_and_accept_text_parts() -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    rows = [{"role": "developer", "content": "S"}, {"role": "user", "content": parts}, TURNS[1]]
    example = converted({"messages": rows}, "messages", system="unused")
    assert turns(example) == [("system", "S"), ("user", "ab"), ("assistant", "Hello")]
    assert example.label is None


def test_sharegpt_roles() -> None:
    pairs = [("system", "s"), ("human", "q"), ("gpt", "a"), ("observation", "o"), ("gpt", "b")]
    rows = [{"from": role, "value": value} for role, value in pairs]
    example = converted({"conversations": rows}, "sharegpt")
    roles = [message.role for message in example.messages]
    assert roles == ["system", "user", "assistant", "tool", "assistant"]


def test_alpaca_joins_instruction_and_input() -> None:
    fields = {"instruction": "Add", "input": "1 2", "output": "3"}
    assert turns(converted(fields, "alpaca")) == [("user", "Add\n\n1 2"), ("assistant", "3")]
    assert turns(converted(fields | {"input": " "}, "alpaca"))[0] == ("user", "Add")
    assert turns(converted(fields | {"system": "S"}, "alpaca"))[0] == ("system", "S")


def test_classification() -> None:
    example = converted({"text": "words", "label": " EC2 "}, "classification", system="S")
    assert example.label == "EC2"
    instructed = add_instruction(example, default_instruction(["A", "B"]), cue="\n\nLabel:")
    asked = "Classify the text. Answer with one of: A, B.\n\nwords\n\nLabel:"
    assert turns(instructed) == [("system", "S"), ("user", asked), ("assistant", "EC2")]


@pytest.mark.parametrize(("label", "text"), [(3, "3"), (0, "0"), (True, "true"), ("x", "x")])
def test_labels_may_be_whole_numbers(label: Any, text: str) -> None:
    assert converted({"text": "t", "label": label}, "classification").label == text


def test_prompt_completion_and_text() -> None:
    example = converted({"prompt": "p", "completion": " c"}, "prompt_completion", system="S")
    assert turns(example) == [("system", "S"), ("user", "p"), ("assistant", " c")]
    assert converted({"text": "words"}, "text") == Example("f:1", text="words")


@pytest.mark.parametrize(
    ("fields", "format"),
    [
        ({"messages": TURNS}, "messages"),
        ({"conversations": TURNS}, "sharegpt"),
        ({"instruction": "Hi", "output": "Hello"}, "alpaca"),
        ({"prompt": "Hi", "completion": "Hello"}, "prompt_completion"),
    ],
)
def test_a_rows_own_system_field_is_its_system_turn(fields: dict[str, Any], format: str) -> None:
    first = turns(converted(fields | {"system": "S"}, format, system="of the recipe"))[0]
    assert first == ("system", "S")
    first = turns(converted(fields | {"system": None}, format, system="of the recipe"))[0]
    assert first == ("system", "of the recipe")


def test_a_system_turn_and_a_field_that_says_otherwise() -> None:
    rows = [{"role": "system", "content": "S"}, *TURNS]
    assert turns(converted({"messages": rows, "system": " S\n"}, "messages"))[0] == ("system", "S")
    assert len(turns(converted({"messages": rows, "system": "S"}, "messages"))) == 3
    found = convert(Row("f:1", {"messages": rows, "system": "T"}), "messages")
    assert isinstance(found, RowProblem) and "'system' says otherwise" in found.what


def test_rename() -> None:
    row = Row("f:1", {"body": "b", "text": "t", "n": 1})
    assert rename(row, {"text": "body"}).fields == {"body": "b", "text": "b", "n": 1}
    assert rename(row, {"text": "absent"}).fields == {"body": "b", "n": 1}
    assert rename(row, {}) is row


SECRET = "secret words"


@pytest.mark.parametrize(
    ("fields", "format", "said"),
    [
        ({}, "text", "'text' is missing"),
        ({"text": 3}, "text", "must be a string, found int"),
        ({"text": " \n"}, "text", "'text' is empty"),
        ({"text": f"{SECRET} \ud800"}, "text", "surrogate"),
        ({"text": SECRET, "label": ""}, "classification", "'label' is empty"),
        ({"text": SECRET, "label": 1.5}, "classification", "found float"),
        ({"prompt": SECRET, "completion": ""}, "prompt_completion", "'completion' is empty"),
        ({"instruction": "", "output": SECRET}, "alpaca", "'instruction' is empty"),
        ({"messages": SECRET}, "messages", "must be a list"),
        ({"messages": []}, "messages", "at least one"),
        ({"messages": [SECRET]}, "messages", r"messages[0] must be an object"),
        ({"messages": [{"role": SECRET, "content": "x"}]}, "messages", "no known role; allowed"),
        ({"messages": TURNS[:1]}, "messages", "last turn"),
        ({"messages": TURNS[1:]}, "messages", "begins with an answer"),
        ({"messages": [TURNS[0], {"role": "assistant", "content": " "}]}, "messages", "is empty"),
        ({"messages": [TURNS[0], {"role": "assistant"}]}, "messages", "no content"),
        ({"messages": [TURNS[0], {**TURNS[1], "weight": 0}]}, "messages", "weight"),
        ({"messages": [TURNS[0], {**TURNS[1], "train": False}]}, "messages", "train"),
        ({"messages": [TURNS[0], {**TURNS[1], "tool_calls": [1]}]}, "messages", "tool_calls"),
        (
            {"instruction": "x", "output": "y", "history": [[SECRET, "z"]]},
            "alpaca",
            "history is not supported",
        ),
        ({"messages": TURNS, "tools": [{}]}, "messages", "tools"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url"}]}, TURNS[1]]},
            "messages",
            "not text",
        ),
    ],
)
def test_problems_name_the_field_and_not_the_text(
    fields: dict[str, Any], format: str, said: str
) -> None:
    what = problem(fields, format)
    assert said in what
    assert SECRET not in what


def test_messages_are_valid_utf8() -> None:
    turns = [{"role": "user", "content": "\ud83d"}, TURNS[1]]
    assert "messages[0] holds half" in problem({"messages": turns}, "messages")
    assert Message("user", "\U0001f600").content  # a whole pair is fine
