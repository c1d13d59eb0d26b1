"""Requests that a server must bear: valid ones, bent ones, and bytes that are no request at all.

`Request`s are drawn from a seed, so that a failure comes again; what the OpenAPI document allows
and forbids is drawn by schemathesis (`test_abuse.py`).
"""

import json
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
SECRET = "kumquat-9f3a"
"""Stands in many requests: no error may show it."""
DEEP = 3000


@dataclass(frozen=True)
class Request:
    """One exchange over HTTP."""

    path: str
    body: bytes
    headers: dict[str, str] = field(default_factory=lambda: {"content-type": "application/json"})
    method: str = "POST"
    is_valid: bool = False
    """It must be answered."""


def valid(source: random.Random, models: list[str], without: str = "") -> Request:
    """A request that the API allows and every engine honours, with some of its parameters.

    `without`: a parameter that this engine does not honour.
    """
    is_chat = source.random() < 0.6
    fields: dict[str, Any] = {"model": source.choice(models), "max_tokens": source.randint(1, 12)}
    if is_chat:
        roles = source.choice([["user"], ["system", "user"], ["user", "assistant", "user"]])
        fields["messages"] = [{"role": role, "content": _text(source)} for role in roles]
    else:
        ids = [source.randrange(20, 300) for _ in range(source.randint(1, 20))]
        fields["prompt"] = source.choice([_text(source) + "x", ids, [ids, ids], ["a", "b"]])
    for name, draw in (CHAT_OPTIONS if is_chat else COMPLETION_OPTIONS).items():
        if source.random() < 0.25 and name != without:
            fields[name] = draw(source)
    if fields.get("stream_options") and not fields.get("stream"):
        del fields["stream_options"]
    if fields.get("echo"):
        fields.pop("logprobs", None)
    if fields.get("top_logprobs") is not None:
        fields["logprobs"] = True
    return Request(CHAT if is_chat else COMPLETIONS, json.dumps(fields).encode(), is_valid=True)


def _text(source: random.Random) -> str:
    return "".join(source.choice("the quick fox éß漢🦊\n\t ") for _ in range(source.randint(0, 30)))


Draw = Callable[[random.Random], Any]
OPTIONS: dict[str, Draw] = {
    "temperature": lambda s: s.choice([0, 0.0, 0.7, 2, None]),
    "top_p": lambda s: s.choice([0.1, 1, None]),
    "seed": lambda s: s.randint(-(2**63), 2**63 - 1),
    "n": lambda s: s.choice([1, 2, 16]),
    "stop": lambda s: s.choice(["asked", ["a", "b"], [], None]),
    "stream": lambda s: s.random() < 0.5,
    "stream_options": lambda s: {"include_usage": True},
    "presence_penalty": lambda s: s.uniform(-2, 2),
    "frequency_penalty": lambda s: s.uniform(-2, 2),
    "logit_bias": lambda s: {str(s.randrange(300)): s.choice([-100, 0.5, 100])},
    "user": lambda s: _text(s),
}
CHAT_OPTIONS = OPTIONS | {
    "logprobs": lambda s: s.choice([True, False, None]),
    "top_logprobs": lambda s: s.choice([0, 3, 20]),
    "response_format": lambda s: s.choice([{"type": "text"}, None]),
}
COMPLETION_OPTIONS = OPTIONS | {"logprobs": lambda s: s.choice([0, 5]), "echo": lambda s: True}

NASTY: list[Any] = [
    *(-1, 0, 17, 2**31, 2**63, -(2**63), 2**64, 10**400, 1e308, -0.0, 0.1, True, False, None),
    *("", " ", "0", "NaN", "\x00", "\ud800", "\u202e" + SECRET, "a" * 5000, "🦊" * 600),
    *("../../../etc/passwd", "/etc/passwd", "C:\\Windows\\win.ini", "~root", "file:///etc/passwd"),
    *("support/acme:../../x", "support/acme:v999999999999999999999", "acme:v-1", ":", "a:b:c"),
    *("tiny-base:v1", "tiny-base\x00", "tiny-base/../tiny-base", "%2e%2e%2f", "{{7*7}}"),
    *("'; DROP TABLE versions; --", "$(id)", "<script>", "{% for i in range(10**9) %}"),
    *([], {}, [[]], [None], [""], ["x"] * 5, ["x" * 513], [1, "a"], {"a": None}),
    *([[[[[[[[[[]]]]]]]]]], {"type": SECRET}, {"type": "json_schema"}, [-1], [2**24], [10**9] * 9),
]
SCHEMAS: list[Any] = [
    {},
    {"type": "object", "properties": {"a": {"enum": [1, "b"]}}, "required": ["a"]},
    {"$ref": "#"},
    {"type": "object", "properties": {"a": {"$ref": "#/properties/a"}}},
    {"$ref": "file:///etc/passwd"},
    {"$ref": "http://127.0.0.1:1/x"},
    {"type": "string", "pattern": "(a+)+$" * 20},
    {"type": "string", "pattern": "a{1,99999}{1,99999}"},
    {"type": "string", "pattern": "("},
    {"type": "string", "minLength": 10**12},
    {"type": "array", "minItems": 10**9, "items": {}},
    {"enum": list(range(4000))},
    {"enum": list(range(5000))},
    {"type": 3},
    {"anyOf": [{"type": "object"}] * 500},
    {"not": {}},
]
HEADERS: list[dict[str, str]] = [
    {"content-type": "text/plain"},
    {"content-type": "application/json; charset=utf-7"},
    {"content-type": "multipart/form-data; boundary=x"},
    {"content-type": "application/x-www-form-urlencoded"},
    {"content-type": ""},
    {"content-encoding": "gzip"},
    {"authorization": "Bearer " + "x" * 4000},
    {"authorization": "Basic Og=="},
    {"authorization": "Bearer tf_000000000000_" + "A" * 43},
    {"host": "evil.example"},
    {"host": "127.0.0.1.evil.example"},
    {"host": "[::1"},
    {"origin": "null"},
    {"origin": "http://evil.example"},
    {"x-forwarded-for": "1.1.1.1", "x-forwarded-host": "evil", "x-real-ip": "::"},
    {"x-http-method-override": "DELETE"},
    {"expect": "100-continue"},
    {"cookie": "a=b;" * 500},
    {"accept": "application/xml", "accept-encoding": "identity;q=0"},
    {"range": "bytes=0-1"},
]


def bent(source: random.Random, models: list[str]) -> Request:
    """A valid request with something wrong or odd about it; some are still valid."""
    made = valid(source, models)
    fields = json.loads(made.body)
    for _ in range(source.randint(1, 3)):
        _bend(source, fields)
    body = json.dumps(fields).encode()
    headers = dict(made.headers)
    if source.random() < 0.15:
        headers |= source.choice(HEADERS)
    return Request(made.path, body, headers)


def _bend(source: random.Random, fields: dict[str, Any]) -> None:
    match source.randrange(7):
        case 0:
            fields[source.choice(list(fields))] = source.choice(NASTY)
        case 1:
            fields.pop(source.choice(list(fields)))
            fields["model"] = fields.get("model", "tiny-base")
        case 2:
            name = source.choice([*CHAT_OPTIONS, *COMPLETION_OPTIONS, "best_of", "max_tokens"])
            fields[name] = source.choice(NASTY)
        case 3:
            name = source.choice(["tools", "chat_template", "guided_regex", "nam", "x" * 300, ""])
            fields[name] = source.choice(NASTY)
        case 4:
            schema = {"name": "a", "schema": source.choice(SCHEMAS)}
            fields["response_format"] = {"type": "json_schema", "json_schema": schema}
        case 5:
            messages = fields.setdefault("messages", [{"role": "user", "content": "x"}])
            if isinstance(messages, list) and messages and isinstance(messages[0], dict):
                messages[0][source.choice(["role", "content", "name", "tool_calls"])] = (
                    source.choice(NASTY)
                )
        case _:
            fields["model"] = source.choice([one for one in NASTY if isinstance(one, str)])


def fixed() -> Iterator[Request]:
    """Cases that no drawing would find."""
    turn = b'"messages":[{"role":"user","content":"x"}]'
    bodies = [
        *(b"", b"null", b"[]", b"1", b'"x"', b"{", b"}", b"\xff\xfe{}", b"\x00" * 99),
        b"\xef\xbb\xbf{}",
        b'{"model":"tiny-base","messages":[{"role":"user","content":"\xff\xfe"}]}',
        b'{"model":"tiny-base","messages":[{"role":"user","content":"\\ud800"}],"max_tokens":2}',
        b'{"model":"tiny-base","model":"nobody",' + turn + b"}",
        b'{"model":"tiny-base",' + turn + b',"temperature":1e400}',
        b'{"model":"tiny-base",' + turn + b',"temperature":NaN}',
        b'{"model":"tiny-base",' + turn + b',"seed":' + b"9" * 100_000 + b"}",
        b'{"model":"tiny-base",' + turn + b',"n":1000000}',
        b'{"model":"tiny-base",' + turn + b',"top_logprobs":1000000,"logprobs":true}',
        b'{"model":"tiny-base",' + turn + b',"stop":[' + b'"a",' * 100_000 + b'"a"]}',
        b"[" * DEEP + b"]" * DEEP,
        b'{"model":' + b'{"a":' * DEEP + b"1" + b"}" * DEEP + b"}",
        b'{"model":"tiny-base",' + turn + b',"metadata":' + b"[" * 150 + b"]" * 150 + b"}",
        b'{"model":"tiny-base",' + turn + b',"chat_template_kwargs":{"a":"' + b"x" * 10**6 + b'"}}',
        b'{"model":"tiny-base",' + turn + b',"chat_template":"' + b"{{a}}" * 200_000 + b'"}',
        b'{"model":"tiny-base","max_tokens":1,"messages":[{"role":"user","content":"'
        + b"fox " * 250_000 + b'"}]}',
        b'{"model":"tiny-base","max_tokens":1,"messages":['
        + b'{"role":"user","content":"x"},' * 30_000 + b'{"role":"user","content":"x"}]}',
        b'{"model":"tiny-base","max_tokens":1,"prompt":[' + b"25," * 300_000 + b"25]}",
        b'{"model":"tiny-base","max_tokens":1,"prompt":[' + b"[25]," * 100_000 + b"[25]]}",
        b'{"model":"tiny-base","max_tokens":16777216,"prompt":"x"}',
        b'{"model":"tiny-base","prompt":"x","logit_bias":{' + b",".join(
            b'"%d":1' % n for n in range(50_000)) + b"}}",
        b'{"model":"' + b"a" * 10**6 + b'",' + turn + b"}",
        b'{"' + b"k" * 10**6 + b'":1}',
        b"{" + b",".join(b'"k%d":1' % n for n in range(100_000)) + b"}",
        b'{"model":"tiny-base","x":"' + b"y" * (5 * 2**20) + b'"}',
    ]  # fmt: skip
    for body in bodies:
        for path in (CHAT, COMPLETIONS):
            yield Request(path, body)
    for headers in HEADERS:
        yield Request(CHAT, b'{"model":"tiny-base","max_tokens":1,' + turn + b"}",
                      {"content-type": "application/json"} | headers)  # fmt: skip
    for method in ("GET", "PUT", "DELETE", "PATCH", "OPTIONS", "HEAD", "TRACE", "PROPFIND", "X"):
        for path in (CHAT, "/v1/models", "/health"):
            yield Request(path, b"", {}, method)
    for path in PATHS:
        yield Request(path, b"", {}, "GET")
        yield Request(path, b"{}")


PATHS = [
    *("/", "//", "/v1", "/v1/", "/v2/models", "/v1/chat/completions/", "/V1/MODELS", "/docs"),
    *("/v1/models/../../etc/passwd", "/v1/models/%2e%2e%2f%2e%2e%2fetc%2fpasswd", "/v1/models/%00"),
    *("/v1/models/%ff%fe", "/v1/models/" + "a" * 5000, "/v1/models/a%2Fb:v1", "/v1/models/:"),
    *("/v1/models/support%2Facme:v99999999999999999999", "/v1/models/tiny-base?x=%ff", "/%2e%2e/"),
    *("/v1/load_lora_adapter", "/v1/unload_lora_adapter", "/openapi.json/x", "/metrics/../health"),
    *("/v1/models?" + "a=b&" * 2000, "/health?" + SECRET, "/.env", "/.git/config", "/robots.txt"),
]

RAW: list[bytes] = [
    b"\r\n\r\n\r\n",
    b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + b"\x00" * 200,
    b"GET / HTTP/9.9\r\nHost: localhost\r\n\r\n",
    b"GET /health HTTP/1.1\r\n\r\n",
    b"GET /health HTTP/1.0\r\n\r\n",
    b"GET /health\r\n\r\n",
    b"GET  /health  HTTP/1.1\r\nHost: localhost\r\n\r\n",
    b"GET /health HTTP/1.1\r\nHost: a\r\nHost: b\r\n\r\n",
    b"GET http://evil.example/health HTTP/1.1\r\nHost: localhost\r\n\r\n",
    b"GET /health HTTP/1.1\r\nHost: localhost\r\n" + b"X: " + b"y" * 200_000 + b"\r\n\r\n",
    b"GET /health HTTP/1.1\r\nHost: localhost\r\n" + b"X: y\r\n" * 20_000 + b"\r\n",
    b"GET /" + b"a" * 200_000 + b" HTTP/1.1\r\nHost: localhost\r\n\r\n",
    b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 5\r\n"
    b"Transfer-Encoding: chunked\r\n\r\n0\r\n\r\nGET /metrics HTTP/1.1\r\n\r\n",
    b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 5\r\n"
    b"Content-Length: 50\r\n\r\n{}",
    b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: -1\r\n\r\n{}",
    b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: "
    + b"9" * 40
    + b"\r\n\r\n",
    b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: \xb2\r\n\r\n{}",
    b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n"
    b"Content-Type: application/json\r\n\r\nffffffffffffffff\r\n{}",
    b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n"
    b"Content-Type: application/json\r\n\r\nzz\r\n{}\r\n0\r\n\r\n",
    b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: gzip, chunked\r\n\r\n",
    b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    b"Authorization: Bearer \xff\xfe\r\nContent-Length: 2\r\n\r\n{}",
    b"GET /health HTTP/1.1\r\nHost: localhost\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n"
    b"Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\nSec-WebSocket-Version: 13\r\n\r\n",
    b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n" * 50,
    b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
]
"""Bytes to a socket: the server answers, or closes the connection."""
