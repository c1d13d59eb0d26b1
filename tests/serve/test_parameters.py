"""Every parameter of the API is honoured, or refused by its name in the API's shape."""

import inspect
from typing import Any

import pytest
from openai.resources.chat.completions import Completions as ChatCompletions
from openai.resources.completions import Completions

from tests.serve.fake_engine import ALL, FakeEngine
from tests.serve.servers import ASKED, Running, serving
from tunefork.serve.api.chat_request import ChatRequest
from tunefork.serve.api.completion_request import CompletionRequest
from tunefork.serve.api.responses import ChatCompletion, Completion
from tunefork.serve.api.sampling_fields import UNSUPPORTED
from tunefork.serve.engine import Capabilities, EngineRequest
from tunefork.serve.settings import ServeSettings

NO_FIELDS = {"self", "extra_headers", "extra_query", "extra_body", "timeout"}


@pytest.mark.parametrize(
    ("create", "model"),
    [(ChatCompletions.create, ChatRequest), (Completions.create, CompletionRequest)],
)
def test_every_parameter_of_the_package_is_known(create: Any, model: Any) -> None:
    parameters = inspect.signature(create).parameters.keys() - NO_FIELDS
    assert parameters - model.model_fields.keys() - UNSUPPORTED.keys() == set()


def _ask(running: Running, path: str = "chat/completions", **fields: Any) -> Any:
    asked: dict[str, Any] = {"model": "tiny-base"}
    asked |= {"messages": ASKED} if path == "chat/completions" else {"prompt": "the dog"}
    with running.http() as http:
        return http.post(f"/v1/{path}", json=asked | fields)


HONOURED: list[tuple[dict[str, Any], dict[str, Any]]] = [
    ({}, {"temperature": 1.0, "top_p": 1.0, "seed": None, "logprobs": None}),
    ({"temperature": 0}, {"temperature": 0.0}),
    ({"temperature": 0.25, "top_p": 0.5}, {"temperature": 0.25, "top_p": 0.5}),
    ({"top_p": 0}, {"temperature": 0.0}),
    ({"presence_penalty": 1, "frequency_penalty": -2.0}, {"presence_penalty": 1.0}),
    ({"seed": -1}, {"seed": 2**63 - 1}),
    ({"logit_bias": {"5": -100, "7": 1.5}}, {"logit_bias": {5: -100.0, 7: 1.5}}),
    ({"stop": "x"}, {"stop": ("x",)}),
    ({"stop": ["x", "y"]}, {"stop": ("x", "y")}),
    ({"max_tokens": 3.0}, {"max_tokens": 3}),
    ({"top_k": 4}, {"top_k": 4}),
    ({"ignore_eos": True, "max_tokens": 2}, {"ignore_eos": True, "stop_ids": ()}),
    ({"user": "someone", "stop": None, "stream": False, "n": 1}, {"stop": ()}),
]


@pytest.mark.parametrize(("fields", "sampling"), HONOURED)
@pytest.mark.parametrize("path", ["chat/completions", "completions"])
def test_a_parameter_reaches_the_engine(
    shared: Running, path: str, fields: dict[str, Any], sampling: dict[str, Any]
) -> None:
    answer = _ask(shared, path, **fields)
    assert answer.status_code == 200, answer.text
    (ChatCompletion if path.startswith("chat") else Completion).model_validate(answer.json())
    seen = _last(shared).sampling
    assert {name: getattr(seen, name) for name in sampling} == sampling


@pytest.mark.parametrize(
    "fields",
    [
        {"modalities": ["text"], "store": False, "service_tier": "auto", "tool_choice": "none"},
        {"tools": None, "audio": None, "metadata": None, "response_format": {"type": "text"}},
        {"verbosity": "medium", "reasoning_effort": "none", "safety_identifier": "someone"},
        {"messages": [{"role": "developer", "content": [{"type": "text", "text": "Be brief"}]}]},
    ],
)
def test_what_asks_for_nothing_else_is_let_through(shared: Running, fields: Any) -> None:
    answer = _ask(shared, **fields)
    assert answer.status_code == 200, answer.text


REFUSED: list[tuple[dict[str, Any], str, str]] = [
    *(({name: [{"x": 1}]}, name, "unsupported_parameter") for name in UNSUPPORTED),
    ({"n": 17}, "n", "invalid_value"),
    ({"n": 10**400}, "n", "invalid_value"),
    ({"n": True}, "n", "invalid_value"),
    ({"n": "2"}, "n", "invalid_value"),
    ({"temperature": -0.1}, "temperature", "invalid_value"),
    ({"temperature": "hot"}, "temperature", "invalid_value"),
    ({"top_p": 1.1}, "top_p", "invalid_value"),
    ({"seed": 2**63}, "seed", "invalid_value"),
    ({"presence_penalty": 2.5}, "presence_penalty", "invalid_value"),
    ({"stop": ["a"] * 5}, "stop", "invalid_value"),
    ({"stop": [""]}, "stop[0]", "invalid_value"),
    ({"stop": 5}, "stop", "invalid_value"),
    ({"max_tokens": 0}, "max_tokens", "invalid_value"),
    ({"max_tokens": 5, "max_completion_tokens": 5}, "max_tokens", "invalid_value"),
    ({"logit_bias": {"dog": 1}}, "logit_bias", "invalid_value"),
    ({"logit_bias": {"9999": 1}}, "logit_bias", "invalid_value"),
    ({"logit_bias": {"5": 101}}, "logit_bias", "invalid_value"),
    ({"top_logprobs": 3}, "top_logprobs", "invalid_value"),
    ({"logprobs": True, "top_logprobs": 21}, "top_logprobs", "invalid_value"),
    ({"stream_options": {"include_usage": True}}, "stream_options", "invalid_value"),
    ({"stream_options": {"x": 1}}, "stream_options.x", "unknown_parameter"),
    ({"store": True}, "store", "invalid_value"),
    ({"modalities": ["audio"]}, "modalities[0]", "invalid_value"),
    ({"temprature": 1}, "temprature", "unknown_parameter"),
    ({"messages": []}, "messages", "invalid_value"),
    ({"messages": [{"role": "robot", "content": ""}]}, "messages[0].role", "invalid_value"),
    ({"messages": [{"role": "user"}]}, "messages[0].content", "missing_required_parameter"),
    (
        {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
        "messages[0].content[0].type",
        "invalid_value",
    ),
    (
        {"messages": [{"role": "user", "content": "a", "name": "b"}]},
        "messages[0].name",
        "unsupported_parameter",
    ),
    (
        {"messages": [{"role": "user", "content": "a", "nmae": "b"}]},
        "messages[0].nmae",
        "unknown_parameter",
    ),
    ({"response_format": {"type": "xml"}}, "response_format.type", "invalid_value"),
    (
        {"response_format": {"type": "json_schema", "json_schema": {"name": "a"}}},
        "response_format.json_schema.schema",
        "missing_required_parameter",
    ),
]


@pytest.mark.parametrize(("fields", "param", "code"), REFUSED)
def test_a_refusal_names_its_parameter(
    shared: Running, fields: dict[str, Any], param: str, code: str
) -> None:
    answer = _ask(shared, **fields)
    assert answer.status_code == 400, answer.text
    error = answer.json()["error"]
    assert (error["param"], error["code"]) == (param, code), error
    assert fields != {"stop": ["a"] * 5} or "at most 4 items" in error["message"]
    assert error["type"] == "invalid_request_error" and set(error) == {
        *("message", "type", "param", "code")
    }


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"store": True}, "store: should be false"),
        ({"parallel_tool_calls": False}, "parallel_tool_calls: should be null"),
        ({"response_format": "json"}, "response_format: should be an object"),
        ({"stop": ["a"] * 5}, "stop: should have at most 4 items, not 5"),
        ({"messages": []}, "messages: should have at least 1 item, not 0"),
        ({"stop": ""}, "stop: should have at least 1 character"),
    ],
)
def test_a_refusal_speaks_of_json(shared: Running, fields: dict[str, Any], message: str) -> None:
    assert _ask(shared, **fields).json()["error"]["message"] == message


def test_what_is_meant_is_a_field_that_there_is(shared: Running) -> None:
    """Never the unknown field itself, which another route or part may have."""
    for fields, hint in (
        ({"temprature": 1}, "; did you mean 'temperature'?"),
        ({"best_of": 2}, ""),
        ({"messages": [{"role": "user", "content": "a", "name": "b"}]}, ""),
    ):
        message = _ask(shared, **fields).json()["error"]["message"]
        assert message.partition("unknown field")[2] == hint, message


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"prompt": []}, "prompt"),
        ({"prompt": ""}, "prompt"),
        ({"prompt": [[]]}, "prompt"),
        ({"prompt": [5, True]}, "prompt"),
        ({"prompt": [99999]}, "prompt"),
        ({"prompt": ["a"] * 65}, "prompt"),
        ({"prompt": ["a"] * 60, "n": 2}, "prompt"),
        ({"best_of": 1, "n": 2}, "best_of"),
        ({"best_of": 2, "stream": True}, "best_of"),
        ({"logprobs": 6}, "logprobs"),
        ({"logprobs": 0, "echo": True}, "logprobs"),
        ({"suffix": "x"}, "suffix"),
        ({"prompt": "dog " * 600}, "prompt"),
    ],
)
def test_a_completion_s_refusal_names_its_parameter(
    shared: Running, fields: dict[str, Any], param: str
) -> None:
    answer = _ask(shared, "completions", **fields)
    assert answer.status_code == 400, answer.text
    assert answer.json()["error"]["param"].partition("[")[0] == param, answer.text


def test_what_the_engine_cannot_do_is_refused_before_it_is_asked(base: Any) -> None:
    least = Capabilities(max_model_len=512, max_logprobs=2, sampling=frozenset({"logprobs"}))
    settings = ServeSettings.model_validate({"base": str(base)})
    with serving(FakeEngine(capabilities=least), settings) as running:
        for fields in (
            {"top_p": 0.5},
            {"seed": 1},
            {"presence_penalty": 1},
            {"logit_bias": {"5": 1}},
            {"stop": "x"},
            {"top_k": 5},
            {"response_format": {"type": "json_object"}},
        ):
            answer = _ask(running, **fields)
            assert answer.status_code == 400
            assert answer.json()["error"]["param"] == next(iter(fields))
            assert answer.json()["error"]["code"] == "unsupported_parameter"
        assert _ask(running, logprobs=True, top_logprobs=3).status_code == 400
        assert _ask(running, logprobs=True, top_logprobs=2, top_p=1).status_code == 200
        assert len(_engine(running).seen) == 1


def test_a_schema_is_bounded(shared: Running) -> None:
    schema: dict[str, Any] = {}
    for _ in range(40):
        schema = {"items": schema}
    wanted: dict[str, Any] = {"type": "json_schema", "json_schema": {"name": "a", "schema": schema}}
    answer = _ask(shared, response_format=wanted)
    assert answer.json()["error"]["param"] == "response_format.json_schema"
    wanted["json_schema"] = {"name": "a", "schema": {"enum": list(range(5000))}}
    assert _ask(shared, response_format=wanted).status_code == 400
    wanted["json_schema"] = {"name": "a", "schema": {"type": "object"}, "strict": True}
    assert _ask(shared, response_format=wanted).status_code == 200
    assert _last(shared).sampling.grammar


def test_messages_are_rendered_as_the_trainer_renders_them(shared: Running) -> None:
    turns: list[dict[str, Any]] = [
        {"role": "system", "content": "the fox"},
        {"role": "user", "content": "hello"},
        {"role": "assistant", "content": "dog"},
        {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
    ]
    assert _ask(shared, messages=turns).status_code == 200
    tokenizer = shared.gateway.base.tokenizer
    turns[-1]["content"] = "ab"
    text = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    seen = _last(shared)
    assert list(seen.prompt_ids) == tokenizer(text, add_special_tokens=False)["input_ids"]
    assert tokenizer.eos_token_id in seen.sampling.stop_ids


def _engine(running: Running) -> FakeEngine:
    engine = running.gateway.engine
    assert isinstance(engine, FakeEngine)
    return engine


def _last(running: Running) -> EngineRequest:
    return _engine(running).seen[-1]


def test_the_whole_of_the_context_may_be_asked_for(shared: Running) -> None:
    assert _ask(shared, max_tokens=ALL.max_model_len - 25).status_code == 200
    assert _ask(shared, max_tokens=ALL.max_model_len - 24).status_code == 400
    assert _last(shared).sampling.max_tokens == ALL.max_model_len - 25
