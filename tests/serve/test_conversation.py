"""What is asked is what was trained on, and an answer ends where the template ends a turn."""

import json
import threading
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tokenizers import AddedToken

from tests.data.conftest import CHATML
from tunefork.data.example import Message
from tunefork.data.loader import Data, load_data
from tunefork.errors import DataError
from tunefork.recipe import DataSection
from tunefork.recipe_file import parse
from tunefork.serve.conversation import Conversation

Make = Callable[..., Any]


class Scripted:
    """A model that says these tokens, and heeds only what ends an answer."""

    device = torch.device("cpu")

    def __init__(self, *says: int, eos: int | list[int] | None = None) -> None:
        self.says = says
        self.generation_config = SimpleNamespace(eos_token_id=eos)
        self.asked: list[list[int]] = []

    def generate(self, ids: torch.Tensor, *, streamer: Any, eos_token_id: Any, **_: Any) -> None:
        self.asked.append(ids[0].tolist())
        streamer.put(ids)
        for token in self.says:
            streamer.put(torch.tensor([token]))
            if token in (eos_token_id or ()):
                break
        streamer.end()


def _ids(tokenizer: Any, text: str) -> list[int]:
    ids: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
    return ids


def _said(talk: Conversation, text: str) -> str:
    return "".join(talk.ask(text))


# Where answers end


@pytest.mark.parametrize("is_special", [True, False])
def test_an_answer_ends_at_the_templates_end_of_turn(
    make_tokenizer: Make, is_special: bool
) -> None:
    """Not at eos alone: Qwen's base models have ChatML and <|endoftext|>."""
    end = "<|im_end|>" if is_special else "<|turn|>"
    tokenizer = make_tokenizer(CHATML.replace("<|im_end|>", end), eos="<|endoftext|>")
    tokenizer.add_tokens([AddedToken(end, special=is_special, normalized=False)])
    closing = tokenizer.convert_tokens_to_ids(end)
    model = Scripted(*_ids(tokenizer, "hello"), closing, *_ids(tokenizer, "the fox"))
    talk = Conversation(model, tokenizer)
    assert talk.stop_ids == [tokenizer.eos_token_id, closing]
    assert _said(talk, "the quick fox") == "hello"
    assert talk.messages == [Message("user", "the quick fox"), Message("assistant", "hello")]


def test_the_models_own_ends_count_too(make_tokenizer: Make) -> None:
    tokenizer = make_tokenizer(None, eos="</s>")
    model = Scripted(*_ids(tokenizer, "hello"), 7, *_ids(tokenizer, "fox"), eos=[7])
    talk = Conversation(model, tokenizer)
    assert talk.stop_ids == [7, tokenizer.eos_token_id]
    assert _said(talk, "the") == "hello"


def test_a_failure_is_raised_and_leaves_no_turn(make_tokenizer: Make) -> None:
    class Broken(Scripted):
        def generate(self, *_: Any, **__: Any) -> None:
            raise ZeroDivisionError

    model = Broken()
    talk = Conversation(model, make_tokenizer())
    with pytest.raises(ZeroDivisionError):
        _said(talk, "the")
    assert talk.messages == []


def test_an_answer_that_is_not_read_on_ends_and_leaves_no_turn(make_tokenizer: Make) -> None:
    """As by Ctrl-C: a thread that computes while Python ends aborts the process."""
    tokenizer, before = make_tokenizer(), threading.active_count()
    talk = Conversation(Scripted(*_ids(tokenizer, "the quick fox ") * 10_000), tokenizer)
    answer = talk.ask("the")
    assert next(answer)
    answer.close()  # type: ignore[attr-defined]
    assert threading.active_count() == before and talk.messages == []


# What is asked


def _labelled(tmp_path: Path, tokenizer: Any, **section: Any) -> tuple[DataSection, Data]:
    rows = [{"text": f"the fox {n}", "label": ["dog", "lazy", "fox"][n % 3]} for n in range(30)]
    file = tmp_path / "train.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    recipe = parse({"model": "none", "data": {"train": str(file)} | section})
    return recipe.data, load_data(recipe, tokenizer)


@pytest.mark.parametrize("template", [CHATML, None], ids=["chat", "plain"])
@pytest.mark.parametrize(
    "section",
    [
        {},
        {"format": "classification"},
        {"instruction": "Which animal?"},
        {"labels": ["fox", "lazy", "dog"]},
        {"system": "be brief", "instruction": "Which animal?"},
    ],
)
def test_a_classifier_is_asked_as_it_was_trained(
    make_tokenizer: Make,
    tmp_path: Path,
    template: str | None,
    section: dict[str, Any],
) -> None:
    tokenizer = make_tokenizer(template, eos="<|im_end|>")
    data_section, data = _labelled(tmp_path, tokenizer, **section)
    model = Scripted(*_ids(tokenizer, "dog"), tokenizer.eos_token_id)
    talk = Conversation(model, tokenizer, data_section)
    for example in data.train[:2]:  # the second is not asked in the first one's conversation
        number = int(example.source.partition(":")[2]) - 1
        assert _said(talk, f"the fox {number}") == "dog"
        assert model.asked[-1] == example.input_ids[: example.prompt_length].tolist()


def test_another_model_is_asked_in_turns(make_tokenizer: Make, tmp_path: Path) -> None:
    tokenizer = make_tokenizer()
    file = tmp_path / "train.jsonl"
    file.write_text('{"prompt": "the", "completion": "fox"}\n')
    model = Scripted(*_ids(tokenizer, "dog"), tokenizer.eos_token_id)
    talk = Conversation(model, tokenizer, DataSection(train=str(file), system="be brief"))
    assert talk.instruction is None
    _said(talk, "the"), _said(talk, "quick")
    turns = [(m.role, m.content) for m in talk.messages]
    assert turns == [
        ("system", "be brief"),
        *[("user", "the"), ("assistant", "dog")],
        *[("user", "quick"), ("assistant", "dog")],
    ]
    assert model.asked[1] == talk.renderer.prompt_ids(talk.messages[:-1])


def test_labels_that_can_no_longer_be_read_are_named(make_tokenizer: Make, tmp_path: Path) -> None:
    gone = DataSection(train=str(tmp_path / "gone.jsonl"), format="classification")
    with pytest.raises(DataError, match=r"gone\.jsonl: no such file.*; set data\.labels"):
        Conversation(Scripted(), make_tokenizer(), gone)
    left_open = gone.model_copy(update={"format": "auto"})
    assert Conversation(Scripted(), make_tokenizer(), left_open).instruction is None


def test_an_empty_text_is_no_row(make_tokenizer: Make, tmp_path: Path) -> None:
    section = DataSection(train=str(tmp_path / "gone.jsonl"), instruction="Which animal?")
    with pytest.raises(DataError, match="the text: the field 'text' is empty"):
        _said(Conversation(Scripted(), make_tokenizer(), section), " ")
