"""However a request or the engine ends: nothing leaks, usage is recorded, others are answered."""

import asyncio
import json
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.serve.fake_engine import FakeEngine, begun, everything, nothing
from tests.serve.servers import ASKED, Running, eventually, serving
from tunefork.errors import (
    AdapterError,
    BadInputError,
    EngineBusyError,
    EngineError,
    ModelError,
    NoAdapterMemoryError,
    NoMemoryError,
)
from tunefork.registry.store import Store
from tunefork.serve.database import connect
from tunefork.serve.engine import Capabilities
from tunefork.serve.run import drain_on_signal
from tunefork.serve.settings import ServeSettings

LONG: dict[str, Any] = {
    "model": "tiny-base",
    "messages": ASKED,
    "ignore_eos": True,
    "max_tokens": 400,
}


def _is_at_rest(running: Running) -> bool:
    engine: Any = running.gateway.engine
    queue = running.gateway.parts.queue
    return not engine.open and (queue.running, queue.waiting) == (0, 0)


def _statuses(settings: ServeSettings) -> list[tuple[str, int, int]]:
    database = connect(settings.accounts_file)
    rows = database.execute("SELECT status, prompt_tokens, completion_tokens FROM usage")
    found = [(row[0], row[1], row[2]) for row in rows]
    database.close()
    return found


def _post(running: Running, body: dict[str, Any], *, buffer: int = 0) -> socket.socket:
    """A connection that has asked and reads nothing."""
    connection = socket.socket()
    if buffer:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, buffer)
    connection.connect(("127.0.0.1", running.port))
    content = json.dumps(body).encode()
    head = (
        "POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\n"
        f"Content-Type: application/json\r\nContent-Length: {len(content)}\r\n\r\n"
    )
    connection.sendall(head.encode() + content)
    return connection


@pytest.mark.parametrize("stream", [True, False])
def test_clients_that_vanish_are_cancelled_and_billed(
    server: Running, engine: FakeEngine, settings: ServeSettings, stream: bool
) -> None:
    engine.holds = lambda request, number: number > 20
    connections = [_post(server, LONG | {"stream": stream}) for _ in range(6)]
    eventually(lambda: len(engine.open) == 6 and engine.computed == 6 * 21)
    for connection in connections:
        connection.close()
    eventually(lambda: _is_at_rest(server))
    eventually(lambda: len(_statuses(settings)) == 6)
    for status, prompt, completion in _statuses(settings):
        assert status == "cancelled" and prompt == 25 and 0 < completion <= 21
    engine.holds = nothing
    assert server.ask().status_code == 200


def test_200_that_vanish_while_they_wait_leave_nothing(settings: ServeSettings) -> None:
    engine = FakeEngine()
    engine.holds = everything
    with serving(engine, settings) as running:
        before = len(list(Path("/proc/self/fd").iterdir()))
        connections = [_post(running, LONG | {"stream": True}) for _ in range(200)]
        eventually(lambda: running.gateway.parts.queue.waiting == 192)
        for connection in connections:
            connection.close()
        eventually(lambda: _is_at_rest(running))
        engine.holds = nothing
        assert running.ask().status_code == 200
        assert len(engine.seen) < 150  # most that waited never reached it; a slow machine sees some
        eventually(lambda: len(list(Path("/proc/self/fd").iterdir())) <= before + 3)


def test_a_client_that_stops_reading_is_cut_off(settings: ServeSettings) -> None:
    engine = FakeEngine()
    wide = Capabilities(
        max_model_len=1 << 20, max_logprobs=20, sampling=engine.capabilities.sampling
    )
    engine.capabilities = wide
    impatient = settings.model_copy(update={"stall_timeout_s": 0.3})
    with serving(engine, impatient) as running:
        body = LONG | {"stream": True, "max_tokens": 200_000}
        connection = _post(running, body, buffer=4096)
        eventually(lambda: engine.computed > 100)
        eventually(lambda: _is_at_rest(running))
        assert engine.computed < 100_000
        eventually(lambda: not running.server.server_state.connections)
        connection.close()
        eventually(lambda: [s[0] for s in _statuses(settings)] == ["cancelled"])
        assert running.ask().status_code == 200


def test_an_answer_that_takes_too_long_ends(settings: ServeSettings) -> None:
    engine = FakeEngine(delay_s=0.05)
    with serving(engine, settings.model_copy(update={"request_timeout_s": 0.3})) as running:
        answer = running.ask(ignore_eos=True, max_tokens=100)
        assert answer.status_code == 503 and "retry-after" in answer.headers
        assert answer.json()["error"]["code"] == "deadline_exceeded"
        events = running.ask(ignore_eos=True, max_tokens=100, stream=True).text.split("\n\n")
        assert json.loads(events[-2][6:])["error"]["code"] == "deadline_exceeded"
        eventually(lambda: _is_at_rest(running))
        eventually(lambda: [s[0] for s in _statuses(settings)] == ["deadline", "deadline"])


def test_a_full_queue_says_when_to_come_again(settings: ServeSettings) -> None:
    engine = FakeEngine()
    engine.holds = everything
    few = settings.model_copy(update={"max_queued_per_tenant": 4})
    with serving(engine, few) as running:
        connections = [_post(running, LONG) for _ in range(12)]
        eventually(lambda: running.gateway.parts.queue.waiting == 4)
        refused = running.ask()
        assert refused.status_code == 429 and int(refused.headers["retry-after"]) >= 1
        assert refused.json()["error"]["code"] == "queue_full"
        for connection in connections:
            connection.close()
        eventually(lambda: _is_at_rest(running))


@pytest.mark.parametrize(
    ("error", "status", "code"),
    [
        (EngineError("in /secret"), 503, "engine_failed"),
        (EngineBusyError("in /secret"), 503, "overloaded"),
        (RuntimeError("in /secret"), 503, "engine_failed"),
        (NoMemoryError("in /secret"), 503, "no_memory"),
        (NoAdapterMemoryError("in /secret"), 503, "no_memory"),
        (BadInputError("in /secret"), 400, "invalid_value"),
        (AdapterError("in /secret"), 400, "adapter_unusable"),
    ],
)
def test_a_request_that_fails_in_the_engine_fails_alone(
    server: Running,
    engine: FakeEngine,
    settings: ServeSettings,
    error: Exception,
    status: int,
    code: str,
) -> None:
    engine.fails = error
    answer = server.ask()
    assert answer.status_code == status and answer.json()["error"]["code"] == code
    assert "secret" not in answer.text and ("retry-after" in answer.headers) == (status == 503)
    events = server.ask(stream=True).text.split("\n\n")
    assert json.loads(events[-2][6:])["error"]["code"] == code
    asked = server.ask(response_format={"type": "json_object"})
    blamed = [told.json()["error"]["param"] for told in (answer, asked)]
    known: dict[type[Exception], list[str | None]] = {
        BadInputError: [None, "response_format"],
        AdapterError: ["model", "model"],
    }
    assert blamed == known.get(type(error), [None, None])
    engine.fails = None
    assert server.ask().status_code == 200
    eventually(lambda: _is_at_rest(server))
    ended = ["refused" if status == 400 else "failed"] * 3 + ["ok"]
    eventually(lambda: [s[0] for s in _statuses(settings)] == ended)


def test_an_engine_that_dies_is_started_again(
    server: Running, engine: FakeEngine, settings: ServeSettings, adapter: Path
) -> None:
    with Store.open() as store:
        store.publish(adapter, "acme")
    engine.holds = everything
    with ThreadPoolExecutor(4) as pool:
        asked = [pool.submit(server.ask, model=m) for m in ("tiny-base", "acme") * 2]
        eventually(lambda: len(engine.open) == 4)
        engine.start_fails = ModelError("in /secret")
        engine.die()
        for answer in (future.result() for future in asked):
            assert answer.status_code == 503 and "secret" not in answer.text
    with server.http() as http:
        eventually(lambda: http.get("/ready").status_code == 503)
        eventually(lambda: "failed 3 times in a row" in http.get("/ready").text)
        assert server.ask().json()["error"]["code"] == "engine_failed"
        assert http.get("/health").json() == {
            "status": "ok",
            "state": "failed",
            "engine": {"name": "fake", "dtype": "float32"},
        }
        engine.start_fails = None
        eventually(lambda: http.get("/ready").status_code == 200)
    engine.holds = nothing
    assert server.ask(model="acme").status_code == 200
    assert engine.starts >= 3 and _is_at_rest(server)
    eventually(lambda: [s[0] for s in _statuses(settings)] == ["failed"] * 4 + ["ok"])


def test_while_it_loads_health_is_told_and_ready_is_not(settings: ServeSettings) -> None:
    engine, may_start = FakeEngine(), threading.Event()
    start = engine.start

    async def slow() -> None:
        await asyncio.to_thread(may_start.wait, 20)
        await start()

    engine.start = slow  # type: ignore[method-assign]
    with serving(engine, settings, wait=False) as running, running.http() as http:
        assert http.get("/health").json()["state"] == "starting"
        assert http.get("/ready").status_code == http.get("/metrics").status_code == 503
        answer = running.ask()
        assert answer.status_code == 503 and answer.json()["error"]["code"] == "starting"
        may_start.set()
        eventually(lambda: http.get("/ready").status_code == 200)


@pytest.mark.slow
def test_health_is_told_while_large_inputs_are_read(server: Running) -> None:
    text = "ab" * 250_000
    with ThreadPoolExecutor(8) as pool, server.http() as http:
        body = [{"role": "user", "content": text}]
        asked = [pool.submit(server.ask, messages=body) for _ in range(16)]
        slowest = 0.0
        while not all(future.done() for future in asked):
            began = time.monotonic()
            assert http.get("/health").status_code == 200
            slowest = max(slowest, time.monotonic() - began)
        assert slowest < 1.0
        assert {future.result().status_code for future in asked} == {400}


def test_a_second_signal_cancels_what_runs_and_tells_it(settings: ServeSettings) -> None:
    """In the API's shape, and on record; the server ends at once."""
    said: list[str] = []
    with serving(FakeEngine(delay_s=0.05), settings) as running, ThreadPoolExecutor(2) as pool:
        drain_on_signal(running.server, running.gateway, said.append)
        asked = [pool.submit(running.ask, **LONG, stream=stream) for stream in (False, True)]
        eventually(lambda: running.gateway.parts.queue.running == 2)
        time.sleep(0.2)  # the stream has begun
        running.server.handle_exit(signal.SIGINT, None)
        eventually(lambda: said)
        assert "a second Ctrl-C" in said[0] and not any(future.done() for future in asked)
        running.server.handle_exit(signal.SIGINT, None)
        plain, stream = (future.result() for future in asked)
        assert plain.status_code == 503 and plain.json()["error"]["code"] == "draining"
        assert json.loads(stream.text.split("\n\n")[-2][6:])["error"]["code"] == "draining"
        assert not running.server.force_exit
    assert [status for status, _, _ in _statuses(settings)] == ["cancelled"] * 2


def test_what_the_end_of_the_drain_cancels_is_on_record(settings: ServeSettings) -> None:
    engine = FakeEngine()
    engine.holds = begun
    with serving(engine, settings) as running, ThreadPoolExecutor(2) as pool:
        running.server.config.timeout_graceful_shutdown = 1
        asked = [pool.submit(running.ask, **LONG, stream=stream) for stream in (False, True)]
        eventually(lambda: running.gateway.parts.queue.running == 2)
        running.server.handle_exit(signal.SIGTERM, None)
        assert [future.result().status_code for future in asked] in ([503, 200], [503, 503])
    assert [status for status, _, _ in _statuses(settings)] == ["cancelled"] * 2


_SERVER = """
import sys, asyncio
from tests.serve.fake_engine import FakeEngine
from tunefork.serve.run import serve
from tunefork.serve.settings import ServeSettings
settings = ServeSettings.model_validate({"base": sys.argv[1], "port": 0, "drain_timeout_s": 5})
serve(FakeEngine(delay_s=0.05), settings, say=lambda line: print(line, flush=True))
print("ended", flush=True)
"""


def _start(base: Path) -> tuple["subprocess.Popen[str]", str]:
    process = subprocess.Popen(
        [sys.executable, "-c", _SERVER, str(base)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=Path(__file__).parents[2],
    )
    assert process.stdout is not None
    line = process.stdout.readline()
    assert "serving tiny-base at http://" in line, process.communicate()
    return process, line.split(" at ")[1].split("/v1")[0]


@pytest.mark.slow
def test_sigterm_lets_answers_finish(base: Path, settings: ServeSettings) -> None:
    process, url = _start(base)
    body = {"model": "tiny-base", "messages": ASKED, "temperature": 0, "stream": True}
    with httpx.stream("POST", f"{url}/v1/chat/completions", json=body, timeout=20) as answer:
        lines = answer.iter_lines()
        next(lines)
        process.send_signal(signal.SIGTERM)
        assert "data: [DONE]" in list(lines)
    out, err = process.communicate(timeout=20)
    assert out.endswith("ended\n") and "Traceback" not in err
    assert [status for status, _, _ in _statuses(settings)] == ["ok"]


@pytest.mark.slow
def test_a_killed_server_has_recorded_what_it_told(base: Path, settings: ServeSettings) -> None:
    process, url = _start(base)
    body = {"model": "tiny-base", "messages": ASKED, "temperature": 0}
    with ThreadPoolExecutor(4) as pool:
        for _ in pool.map(
            lambda _: httpx.post(f"{url}/v1/chat/completions", json=body, timeout=20), range(4)
        ):
            pass
        process.kill()
    process.communicate(timeout=20)
    assert [status for status, _, _ in _statuses(settings)] == ["ok"] * 4
