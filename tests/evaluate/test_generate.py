"""Batched greedy answers against one at a time, and what is computed from them."""

import copy
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import AddedToken

from tests.tiny import CONFIGS, VOCABULARY, tiny_model
from tunefork.data.example import Encoded
from tunefork.evaluate.generate import generation_columns, greedy_answers, stop_ids
from tunefork.model.attention import NAME, register

EOS = 2
_BATCHING: dict[str, Any] = {"max_new_tokens": 8, "max_tokens": 64, "pad_id": 0}


def _examples(lengths: tuple[int, ...] = (9, 4, 13, 6, 4)) -> list[Encoded]:
    """Random prompts of these lengths, each with the answer `w7 w8` and eos."""
    rng = np.random.default_rng(0)
    examples = []
    for at, length in enumerate(lengths):
        prompt = rng.integers(4, VOCABULARY, length, dtype=np.int32)
        ids = np.concatenate([prompt, np.array([7, 8, EOS], dtype=np.int32)])
        supervised = np.arange(len(ids)) >= length
        examples.append(
            Encoded(f"rows:{at + 1}", ids, supervised, prompt_length=length, answer="w7 w8")
        )
    return examples


@torch.inference_mode()
def _one_by_one(model: Any, tokenizer: Any, example: Encoded, num_tokens: int) -> str:
    """Greedy by its definition, without a cache: append the likeliest token until eos."""
    ids = example.input_ids[: example.prompt_length].tolist()
    for _ in range(num_tokens):
        ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
        if ids[-1] == EOS:
            break
    answer: str = tokenizer.decode(ids[example.prompt_length :], skip_special_tokens=True)
    return answer.strip()


@pytest.mark.parametrize("max_tokens", [1, 40, 1000])
@pytest.mark.parametrize("architecture", CONFIGS)
def test_batches_answer_as_each_alone(tokenizer: Any, architecture: str, max_tokens: int) -> None:
    register()
    model, examples = tiny_model(architecture, attn_implementation=NAME), _examples()
    batching = _BATCHING | {"max_tokens": max_tokens}
    found = greedy_answers(model, tokenizer, examples, **batching)
    alone = tiny_model(architecture)
    assert found == [_one_by_one(alone, tokenizer, example, 8) for example in examples]
    assert len(set(found)) > 2  # the prompt matters


def test_an_answer_stops_at_its_end(tokenizer: Any) -> None:
    model, examples = tiny_model(seed=3), _examples()
    whole = greedy_answers(model, tokenizer, examples, **_BATCHING)
    ids = [tokenizer(answer)["input_ids"] for answer in whole]
    end = ids[0][2]
    model.generation_config.eos_token_id = end  # a token that the first answer has third
    stopped = greedy_answers(model, tokenizer, examples, **_BATCHING)
    for before, after in zip(ids, stopped, strict=True):
        upto = before.index(end) if end in before else len(before)
        assert tokenizer(after)["input_ids"] == before[:upto]
    assert len(stopped[0]) < len(whole[0])


def test_every_way_to_end_is_a_stop(tokenizer: Any) -> None:
    model, examples = tiny_model(), _examples()
    model.generation_config.eos_token_id = [5, 6]
    assert stop_ids(model, tokenizer, examples) == [5, 6, EOS]
    model.generation_config.eos_token_id = None
    assert stop_ids(model, tokenizer, examples) == [EOS]
    ends_in_bos = [Encoded("rows:1", np.array([9, 1], dtype=np.int32), np.array([False, True]))]
    assert stop_ids(model, tokenizer, ends_in_bos) == [EOS, 1]
    ends_in_a_word = [Encoded("rows:1", np.array([9, 8], dtype=np.int32), np.array([False, True]))]
    assert stop_ids(model, tokenizer, ends_in_a_word) == [EOS]


def test_a_closing_token_without_a_name_is_a_stop_and_no_text(tokenizer: Any) -> None:
    """ChatML's <|im_end|> where eos is another: transformers 5 does not count it as special."""
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.add_tokens([AddedToken("w9", special=False, normalized=False)])
    tokenizer.chat_template = "{% for m in messages %}{{ m.content + 'w9' }}{% endfor %}"
    end = tokenizer.convert_tokens_to_ids("w9")
    assert end not in tokenizer.all_special_ids
    model, examples = tiny_model(), _examples()
    assert stop_ids(model, tokenizer, examples) == [EOS]
    closed = [
        replace(e, input_ids=np.where(e.input_ids == EOS, end, e.input_ids)) for e in examples
    ]
    assert stop_ids(model, tokenizer, closed) == [EOS, end]
    told = torch.tensor([[7, 8, end, 0]]).repeat(len(examples), 1)
    model.generate = lambda ids, **_: torch.cat([ids, told[: len(ids)]], dim=1)
    assert set(greedy_answers(model, tokenizer, closed, **_BATCHING)) == {"w7 w8"}


def test_each_answer_of_a_conversation_may_end_otherwise(tokenizer: Any) -> None:
    """Phi-3 closes a turn with <|end|>, but a conversation with <|endoftext|> after it."""
    ids = np.array([9, 7, 1, 9, 8, EOS], dtype=np.int32)
    supervised = np.array([False, True, True, False, True, True])
    model = tiny_model()
    model.generation_config.eos_token_id = None
    assert stop_ids(model, tokenizer, [Encoded("rows:1", ids, supervised)]) == [EOS, 1]


def test_the_models_own_habits_are_left_out(tokenizer: Any) -> None:
    model, examples = tiny_model(), _examples()
    greedy = greedy_answers(model, tokenizer, examples, **_BATCHING)
    own = model.generation_config
    own.repetition_penalty, own.no_repeat_ngram_size, own.num_beams = 3.0, 1, 3
    assert greedy_answers(model, tokenizer, examples, **_BATCHING) == greedy
    assert model.generation_config is own and own.num_beams == 3


def test_columns_by_hand(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    answers = ["w7 w8", "w7 w9", "", "w8 w7", "W7 w8 w9 w9"]
    monkeypatch.setattr("tunefork.evaluate.generate.greedy_answers", lambda *_, **__: list(answers))
    columns = generation_columns(tiny_model(), tokenizer, _examples(), **_BATCHING)
    assert columns["exact_match"].tolist() == [1, 0, 0, 0, 0]
    # Longest common subsequences of 2, 1, 0, 1 and 2 words; F1 = 2 LCS / (words + words)
    np.testing.assert_allclose(columns["rouge_l"], [1, 1 / 2, 0, 1 / 2, 4 / 6])


def test_columns_follow_the_examples(tokenizer: Any) -> None:
    """Though the longest prompts are answered first."""
    model, examples = tiny_model(), _examples()
    answers = greedy_answers(model, tokenizer, examples, **_BATCHING)
    half = " ".join(answers[3].split()[:4])
    references = ["w7 w8", answers[1], "w7 w8", half, "w7 w8"]
    pairs = zip(examples, references, strict=True)
    examples = [replace(example, answer=reference) for example, reference in pairs]
    columns = generation_columns(model.train(), tokenizer, examples, **_BATCHING)
    assert model.training
    assert columns["exact_match"].tolist() == [0, 1, 0, 0, 0]
    assert columns["rouge_l"][1] == 1
    assert columns["rouge_l"][3] == pytest.approx(8 / 12)
