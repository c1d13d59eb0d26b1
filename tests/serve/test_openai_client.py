"""The official openai package against a real server: sync and async, streaming and not."""

import asyncio
from collections.abc import Iterator
from typing import Any

import openai
import pytest

from tests.serve.servers import ASKED, Running

BASE, ADAPTER = "base was asked 25 tokens", "support/acme:v1 was asked 25 tokens"
PLAIN: Any = {"messages": ASKED, "temperature": 0}


@pytest.fixture(scope="module")
def client(shared: Running) -> Iterator[Any]:
    with openai.OpenAI(base_url=f"{shared.url}/v1", api_key="none", max_retries=0) as client:
        yield client


def test_base_and_adapter_answer_by_their_names(client: Any) -> None:
    answer = client.chat.completions.create(model="tiny-base", **PLAIN)
    assert answer.choices[0].message.content == BASE
    assert answer.choices[0].finish_reason == "stop"
    assert answer.usage and answer.usage.prompt_tokens == 25
    assert answer.usage.completion_tokens == answer.usage.total_tokens - 25 == 20
    for name in ("support/acme", "support/acme:prod", "support/acme:v1", "support/acme:latest"):
        answer = client.chat.completions.create(model=name, **PLAIN)
        assert answer.choices[0].message.content == ADAPTER
        assert answer.model == "support/acme:v1"


def test_an_answer_can_be_sent_back_as_it_is(client: Any) -> None:
    first = client.chat.completions.create(model="tiny-base", **PLAIN)
    turns: Any = [*ASKED, first.choices[0].message, *ASKED]
    again = client.chat.completions.create(model="tiny-base", messages=turns, temperature=0)
    assert again.usage and again.usage.prompt_tokens > 50


def test_a_stream_says_the_same_in_pieces(client: Any) -> None:
    options: Any = {"stream": True, "stream_options": {"include_usage": True}}
    chunks = list(client.chat.completions.create(model="support/acme", **PLAIN, **options))
    assert chunks[0].choices[0].delta.role == "assistant"
    text = "".join(c.choices[0].delta.content or "" for c in chunks[:-1])
    assert text == ADAPTER and len(chunks) > 10
    assert [c.choices[0].finish_reason for c in chunks[:-1]] == [None] * (len(chunks) - 2) + [
        "stop"
    ]
    assert all(chunk.usage is None for chunk in chunks[:-1])
    assert chunks[-1].choices == [] and chunks[-1].usage
    assert chunks[-1].usage.prompt_tokens == 25


def test_n_answers_have_seeds_of_their_own(client: Any) -> None:
    answer = client.chat.completions.create(model="tiny-base", messages=ASKED, n=3, seed=7)
    texts = [choice.message.content for choice in answer.choices]
    assert texts == [f"{BASE} seed {seed}" for seed in (7, 8, 9)]
    assert [choice.index for choice in answer.choices] == [0, 1, 2]
    assert answer.usage and answer.usage.prompt_tokens == 25
    chunks = client.chat.completions.create(
        model="tiny-base",
        messages=ASKED,
        n=3,
        seed=7,
        stream=True,
    )
    streamed = ["", "", ""]
    for chunk in chunks:
        streamed[chunk.choices[0].index] += chunk.choices[0].delta.content or ""
    assert streamed == texts


def test_a_stop_text_ends_the_answer(client: Any) -> None:
    answer = client.chat.completions.create(model="tiny-base", stop=["asked"], **PLAIN)
    assert answer.choices[0].message.content == "base was "
    assert answer.choices[0].finish_reason == "stop"


def test_max_tokens_cut_the_answer(client: Any) -> None:
    for name in ("max_tokens", "max_completion_tokens"):
        answer = client.chat.completions.create(model="tiny-base", **PLAIN, **{name: 3})
        assert answer.choices[0].finish_reason == "length"
        assert answer.usage and answer.usage.completion_tokens == 3


def test_logprobs_have_bytes_and_alternatives(client: Any) -> None:
    for stream in (False, True):
        answer: Any = client.chat.completions.create(
            model="tiny-base", logprobs=True, top_logprobs=2, stream=stream, **PLAIN
        )
        choices = [chunk.choices[0] for chunk in answer] if stream else answer.choices
        tokens = [t for c in choices if c.logprobs for t in c.logprobs.content]
        assert b"".join(bytes(token.bytes) for token in tokens).decode() == BASE
        assert {token.logprob for token in tokens} == {-0.5}
        assert {len(token.top_logprobs) for token in tokens} == {2}


def test_json_is_constrained(client: Any) -> None:
    answer = client.chat.completions.create(
        model="tiny-base", response_format={"type": "json_object"}, **PLAIN
    )
    assert answer.choices[0].message.content == '{"answer": "base"}'


def test_completions_take_texts_and_tokens(client: Any, shared: Running) -> None:
    ids = shared.gateway.base.tokenizer("the quick")["input_ids"]
    asked: tuple[tuple[Any, int], ...] = (
        *(("the quick", 1), (["the quick", "dog"], 2)),
        *((ids, 1), ([ids, ids[:1]], 2)),
    )
    for prompt, count in asked:
        answer = client.completions.create(
            model="support/acme", prompt=prompt, temperature=0, max_tokens=64
        )
        assert answer.choices[0].text == f"support/acme:v1 was asked {len(ids)} tokens"
        assert len(answer.choices) == count
    default = client.completions.create(model="tiny-base", prompt="dog", temperature=0)
    assert default.usage and default.usage.completion_tokens == 16


def test_completions_echo_rank_and_stream(client: Any) -> None:
    asked: Any = {"model": "tiny-base", "prompt": "the dog", "temperature": 0, "max_tokens": 64}
    answer = client.completions.create(**asked, logprobs=1)
    logprobs = answer.choices[0].logprobs
    assert logprobs and logprobs.text_offset and logprobs.text_offset[:2] == [0, 1]
    assert logprobs.tokens and "".join(logprobs.tokens) == answer.choices[0].text
    answer = client.completions.create(**asked, echo=True)
    assert answer.choices[0].text.startswith("the dogbase was asked")
    best = client.completions.create(**asked, best_of=3, n=2)
    assert [choice.index for choice in best.choices] == [0, 1]
    assert best.choices[0].logprobs is None
    chunks = list(client.completions.create(**asked, stream=True, echo=True))
    assert "".join(chunk.choices[0].text for chunk in chunks) == answer.choices[0].text
    assert chunks[-1].choices[0].finish_reason == "stop"


def test_models_show_parent_and_root_without_paths(client: Any) -> None:
    found: list[Any] = list(client.models.list())
    assert [(model.id, model.parent, model.root) for model in found] == [
        ("tiny-base", None, "tiny-base"),
        ("support/acme", "tiny-base", "support/acme:v1"),
        ("support/acme:prod", "tiny-base", "support/acme:v1"),
        ("support/acme:v1", "tiny-base", "support/acme:v1"),
    ]
    assert "/tmp" not in repr(found)
    for model in found:
        assert client.models.retrieve(model.id) == model
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("support/other")


def test_errors_have_the_api_s_shape(client: Any) -> None:
    with pytest.raises(openai.BadRequestError) as bad:
        client.chat.completions.create(model="tiny-base", **PLAIN | {"temperature": 3})
    assert (bad.value.param, bad.value.type) == ("temperature", "invalid_request_error")
    with pytest.raises(openai.NotFoundError) as missing:
        client.chat.completions.create(model="nobody/none", **PLAIN)
    assert missing.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError) as long:
        client.chat.completions.create(model="tiny-base", max_tokens=500, **PLAIN)
    assert long.value.code == "context_length_exceeded"


def test_the_async_client_is_answered_alike(shared: Running) -> None:
    async def run() -> None:
        async with openai.AsyncOpenAI(base_url=f"{shared.url}/v1", api_key="none") as client:
            names = ["tiny-base", "support/acme"] * 4
            answers = await asyncio.gather(
                *(client.chat.completions.create(model=name, **PLAIN) for name in names)
            )
            assert [a.choices[0].message.content for a in answers] == [BASE, ADAPTER] * 4
            stream: Any = await client.chat.completions.create(
                model="support/acme", stream=True, **PLAIN
            )
            text = "".join([chunk.choices[0].delta.content or "" async for chunk in stream])
            assert text == ADAPTER

    asyncio.run(run())
