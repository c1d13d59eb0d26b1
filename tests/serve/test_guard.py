"""Where requests may come from, how large and deep they may be; no five-hundreds but 503."""

import json
import socket
from collections.abc import Collection
from contextlib import suppress
from typing import Any

import pytest
from fastapi import FastAPI
from pydantic import ValidationError

from tests.serve.fake_engine import FakeEngine, begun
from tests.serve.servers import ASKED, Running, serving
from tunefork.errors import BadInputError
from tunefork.serve.api import reading
from tunefork.serve.api.chat_request import ChatRequest
from tunefork.serve.api.completion_request import CompletionRequest
from tunefork.serve.api.errors import ApiError, from_validation
from tunefork.serve.api.sampling_fields import SamplingFields
from tunefork.serve.run import bind, check_exposure, configure
from tunefork.serve.settings import ServeSettings
from tunefork.serve.tenants import Tenant, add_key


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("localhost", 200),
        ("localhost:8000", 200),
        ("LocalHost", 200),
        ("127.0.0.1:1", 200),
        ("[::1]:80", 200),
        ("evil.example", 403),
        ("localhost.evil.example", 403),
        ("127.0.0.1.evil.example", 403),
        ("10.0.0.1", 403),
        ("[::1", 403),
        ("localhost@evil.example", 403),
    ],
)
def test_only_this_machine_s_names_are_heeded(shared: Running, host: str, status: int) -> None:
    with shared.http() as http:
        answer = http.get("/v1/models", headers={"Host": host})
    assert answer.status_code == status
    if status == 403:
        assert answer.json()["error"]["code"] == "host_not_allowed" and host not in answer.text


def test_pages_of_other_origins_may_not_call(shared: Running) -> None:
    with shared.http() as http:
        for origin in ("http://evil.example", "null", shared.url + "1", "https" + shared.url[4:]):
            answer = http.post("/v1/chat/completions", json={}, headers={"Origin": origin})
            assert answer.status_code == 403
            assert answer.json()["error"]["code"] == "origin_not_allowed"
        assert http.get("/v1/models", headers={"Origin": shared.url}).status_code == 200


def test_what_the_operator_allows_may(settings: ServeSettings) -> None:
    allowed = settings.model_copy(
        update={"allowed_hosts": ("ai.example",), "allowed_origins": ("https://app.example",)}
    )
    with serving(FakeEngine(), allowed) as running, running.http() as http:
        headers = {"Host": "ai.example", "Origin": "https://app.example"}
        answer = http.get("/v1/models", headers=headers)
        assert answer.status_code == 200
        assert answer.headers["access-control-allow-origin"] == "https://app.example"
        asked = headers | {"Access-Control-Request-Method": "POST"}
        assert http.options("/v1/chat/completions", headers=asked).status_code == 200
        refused = http.get("/v1/models", headers=headers | {"Host": "evil.example"})
        assert refused.status_code == 403  # and its page may read why
        assert refused.headers["access-control-allow-origin"] == "https://app.example"


HOSTILE: list[tuple[str, bytes, int]] = [
    ("no json", b"{", 400),
    ("no object", b"[]", 400),
    ("no unicode", b'{"model": "\xff"}', 400),
    ("half a surrogate", b'{"model": "\\ud800"}', 400),
    ("NaN", b'{"temperature": NaN}', 400),
    ("deep", b'{"a":' * 5000 + b"1" + b"}" * 5000, 400),
    ("deep lists", b'{"messages":' + b"[" * 100_000 + b"]" * 100_000 + b"}", 400),
    ("a huge number", b'{"model": "tiny-base", "messages": [], "n": ' + b"9" * 100_000 + b"}", 400),
    ("a path", b'{"model": "../../etc/passwd", "messages": [{"role":"user","content":"a"}]}', 404),
    ("a NUL", b'{"model": "a\\u0000", "messages": [{"role":"user","content":"a"}]}', 404),
    ("1 MB of template", json.dumps({"chat_template_kwargs": {"a": "b" * 2**20}}).encode(), 400),
    ("a long name", json.dumps({"model": "a" * 2**20, "messages": ASKED}).encode(), 400),
    ("many unknown keys", json.dumps({f"k{i}": 1 for i in range(300_000)}).encode(), 400),
    ("many prompts", json.dumps({"prompt": [[25]] * 500_000}).encode(), 400),
    ("a wide turn", json.dumps({"messages": [{f"k{i}": 1 for i in range(200_000)}]}).encode(), 400),
    ("many turns", json.dumps({"messages": [{"role": "x"}] * 200_000}).encode(), 400),
    ("many stops", json.dumps({"stop": [""] * 900_000}).encode(), 400),
    ("an unknown format", b'{"response_format": {"type": "kumquat"}}', 400),
    ("too large", b'{"model": "' + b"a" * 5 * 2**20 + b'"}', 413),
]


@pytest.mark.parametrize(
    ("content", "status"), [h[1:] for h in HOSTILE], ids=[h[0] for h in HOSTILE]
)
def test_hostile_bodies_are_refused(shared: Running, content: bytes, status: int) -> None:
    with shared.http() as http:
        headers = {"Content-Type": "application/json"}
        answer = http.post("/v1/chat/completions", content=content, headers=headers)
        assert answer.status_code == status, answer.text
        assert "kumquat" not in answer.text
        if status == 400:
            assert http.post("/v1/completions", content=content, headers=headers).is_client_error
        assert set(answer.json()["error"]) == {"message", "type", "param", "code"}
        assert len(answer.text) < 1000
        assert http.get("/health").status_code == 200


def test_a_text_may_hold_brackets(shared: Running) -> None:
    text = '[{"\\' * 20_000
    answer = shared.ask(messages=[{"role": "user", "content": text}])
    assert answer.json()["error"]["code"] == "context_length_exceeded"
    answer = shared.ask(messages=[{"role": "user", "content": "a"}] * 17_000)
    assert "arrays and objects" in answer.json()["error"]["message"]


@pytest.mark.parametrize("model", [ChatRequest, CompletionRequest])
def test_no_body_makes_many_errors(
    monkeypatch: pytest.MonkeyPatch, model: type[SamplingFields]
) -> None:
    """Each takes pydantic's time, and a body may hold hundreds of thousands of faults."""
    counts: list[int] = []

    def count(error: ValidationError, known: frozenset[str], own: Collection[str]) -> ApiError:
        counts.append(error.error_count())
        return from_validation(error, known, own)

    monkeypatch.setattr(reading, "from_validation", count)
    for _, content, status in HOSTILE:
        if status == 400:
            with pytest.raises(ApiError):
                reading.parse(content, model)
    assert len(counts) >= 3 and max(counts) < 20


def test_a_text_that_is_too_long_is_refused_untokenised(shared: Running) -> None:
    for text, path in (("dog " * 500_000, "chat/completions"), ("dog " * 500_000, "completions")):
        body: dict[str, Any] = {"model": "tiny-base"}
        asked = {"messages": [{"role": "user", "content": text}], "prompt": text}
        body |= {k: v for k, v in asked.items() if (k == "prompt") == (path == "completions")}
        with shared.http() as http:
            answer = http.post(f"/v1/{path}", json=body)
        assert answer.status_code == 400
        assert answer.json()["error"]["code"] == "context_length_exceeded"
        assert "at least" in answer.json()["error"]["message"]


def test_other_bodies_than_json_are_refused(shared: Running) -> None:
    with shared.http() as http:
        for headers in ({"Content-Type": "text/plain"}, {}, {"Content-Encoding": "gzip"}):
            headers = {"Content-Type": "application/json"} | headers if headers else {}
            answer = http.post("/v1/chat/completions", content=b"{}", headers=headers)
            assert answer.status_code == 415


def test_a_body_without_end_is_cut_off(settings: ServeSettings) -> None:
    quick = settings.model_copy(update={"body_timeout_s": 0.2, "max_body_bytes": 10_000})
    with serving(FakeEngine(), quick) as running:
        head = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\n"
        head += b"Content-Type: application/json\r\n"
        with socket.create_connection(("127.0.0.1", running.port)) as slow:
            slow.sendall(head + b"Content-Length: 100\r\n\r\n{")
            assert b" 408 " in slow.recv(1000)
        with socket.create_connection(("127.0.0.1", running.port)) as endless:
            chunk = b"4000\r\n" + b" " * 0x4000 + b"\r\n"
            endless.sendall(head + b"Transfer-Encoding: chunked\r\n\r\n" + chunk)
            assert b" 413 " in endless.recv(1000)


def test_a_head_is_bounded(shared: Running) -> None:
    with socket.create_connection(("127.0.0.1", shared.port), timeout=60) as endless:
        endless.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\n")
        with suppress(ConnectionError):
            for number in range(100):
                endless.sendall(f"X-{number}: {'a' * 1000}\r\n".encode())
        assert b" 400 " in endless.recv(1000)
    assert configure(FastAPI(), shared.gateway.settings).http == "h11"


def test_unknown_paths_and_methods_have_the_api_s_shape(shared: Running) -> None:
    with shared.http() as http:
        error = http.post("/v1/responses").json()["error"]
        assert error["code"] == "unknown_url" and "POST /v1/chat/completions," in error["message"]
        answer = http.get("/v1/chat/completions")
        assert answer.status_code == 405 and answer.headers["allow"] == "POST"
        assert answer.json()["error"]["code"] == "method_not_allowed"


def test_what_fails_unforeseen_is_a_503(shared: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("in /secret/path")

    monkeypatch.setattr(shared.gateway.parts.queue, "enter", fail)
    answer = shared.ask()
    assert answer.status_code == 503 and answer.headers["retry-after"] == "1"
    assert answer.json()["error"]["code"] == "internal_error" and "secret" not in answer.text


def test_too_many_at_once_are_sent_away_but_health_is_told(settings: ServeSettings) -> None:
    engine = FakeEngine()
    engine.holds = begun
    few = settings.model_copy(update={"max_open_requests": 1})
    with serving(engine, few) as running, running.http() as http:
        body = {"model": "tiny-base", "messages": ASKED, "stream": True}
        with http.stream("POST", "/v1/chat/completions", json=body) as first:
            lines = first.iter_lines()
            next(lines)
            refused = running.ask()
            assert refused.status_code == 503 and "retry-after" in refused.headers
            with running.http() as other:
                assert other.get("/health").status_code == 200


def test_beyond_the_loopback_a_key_is_demanded(settings: ServeSettings) -> None:
    outside = settings.model_copy(update={"host": "0.0.0.0", "port": 0})
    with pytest.raises(BadInputError, match="there is no key yet"):
        check_exposure(outside)
    key = add_key(settings.accounts_file, Tenant("a"))
    check_exposure(outside)
    with serving(FakeEngine(), outside) as running:
        assert running.ask().status_code == 401
        assert running.ask(key).status_code == 200
        with running.http(key) as http:
            assert http.get("/v1/models", headers={"Host": "10.0.0.1"}).status_code == 200
            assert http.get("/v1/models", headers={"Host": "evil.example"}).status_code == 403


def test_a_port_in_use_is_said_before_anything_is_loaded(shared: Running) -> None:
    settings = shared.gateway.settings.model_copy(update={"port": shared.port})
    with pytest.raises(BadInputError, match="cannot listen"):
        bind(settings)
