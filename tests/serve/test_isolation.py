"""Tenant A cannot name, list, use or bill to tenant B, nor learn whether what is B's exists."""

import asyncio
import json
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Event
from typing import Any

import pytest

from tests.serve.fake_engine import FakeEngine, everything, nothing
from tests.serve.servers import ASKED, Running, eventually, serving
from tunefork.data.example import Message
from tunefork.registry.store import Store
from tunefork.serve.api import guard
from tunefork.serve.door import Door
from tunefork.serve.gateway import Gateway
from tunefork.serve.ledger import read_usage
from tunefork.serve.prompts import Prompts
from tunefork.serve.settings import ServeSettings
from tunefork.serve.tenants import Tenant, add_key, revoke_key


@pytest.fixture
def keys(adapter: Path, settings: ServeSettings) -> dict[str, str]:
    """Of tenants a and b, each with an adapter, and of an operator."""
    with Store.open() as store:
        version = store.publish(adapter, "a/one", tags=("prod",))
        store.publish(adapter, "b/one", tags=("prod",))
        store.publish(adapter, version.digest[:8])  # a name that is a digest to the store
    tenants = (
        Tenant("a", ("a/*", "*0*", "*1*", "*2*")),
        Tenant("b", ("b/*",), has_base=False),
        Tenant("ops", (), is_operator=True),
    )
    return {tenant.name: add_key(settings.accounts_file, tenant) for tenant in tenants}


@pytest.fixture
def two(keys: dict[str, str], settings: ServeSettings) -> Iterator[Running]:
    with serving(FakeEngine(), settings) as running:
        yield running


def test_without_a_key_nothing_is_told(two: Running) -> None:
    with two.http() as http:
        for path in ("/v1/models", "/v1/models/tiny-base", "/metrics"):
            answer = http.get(path)
            assert answer.status_code == 401
            assert answer.json()["error"]["code"] == "invalid_api_key"
        assert http.get("/health").json()["engine"] is None
        for header in ("Basic abc", "Bearer", "tf_x", "Bearer tf_000000000000_x"):
            answer = http.get("/v1/models", headers={"Authorization": header})
            assert answer.status_code == 401


def test_a_tenant_lists_only_its_own(two: Running, keys: dict[str, str]) -> None:
    def ids(name: str) -> list[str]:
        with two.http(keys[name]) as http:
            return [model["id"] for model in http.get("/v1/models").json()["data"]]

    assert ids("b") == ["b/one", "b/one:prod", "b/one:v1"]
    assert "tiny-base" in ids("a") and not any(id.startswith("b/") for id in ids("a"))


def test_not_yours_and_not_there_are_told_alike(two: Running, keys: dict[str, str]) -> None:
    names = ("a/one", "a/one:prod", "a/one:v1", "a/none", "a/one:none", "tiny-base", "../x", "")
    told = {two.ask(keys["b"], model=name).text for name in names[:-1]}
    assert len(told) == 1
    with two.http(keys["b"]) as http:
        assert {http.get(f"/v1/models/{name}").text for name in names[:-2]} == told
    assert two.ask(keys["b"], model="b/one").status_code == 200
    assert two.ask(keys["b"], model="b/none").text in told


def test_a_digest_leads_to_nobody_s_version(two: Running, keys: dict[str, str]) -> None:
    with Store.open() as store:
        digest = store.resolve("b/one").digest
    for name in (f"sha256:{digest}", digest, digest[:12], f"{digest[:12]}:latest"):
        answer = two.ask(keys["a"], model=name)
        assert answer.status_code == 404, name


def test_the_engine_is_told_whose_it_is(two: Running, keys: dict[str, str]) -> None:
    two.ask(keys["a"], model="a/one")
    two.ask(keys["b"], model="b/one")
    engine: Any = two.gateway.engine
    assert [(seen.tenant, seen.adapter.id) for seen in engine.seen] == [
        ("a", "a/one:v1"),
        ("b", "b/one:v1"),
    ]


def test_usage_is_billed_to_whoever_asked(
    two: Running, keys: dict[str, str], settings: ServeSettings
) -> None:
    two.ask(keys["a"], model="a/one")
    two.ask(keys["b"], model="b/one", user="a")
    two.ask(keys["b"], model="a/one")
    rows = read_usage(settings.accounts_file)
    assert [(row.tenant, row.model, row.requests) for row in rows] == [
        ("a", "a/one:v1", 1),
        ("b", "b/one:v1", 1),
    ]
    assert rows[0].prompt_tokens == 25 and rows[0].completion_tokens > 5


def test_metrics_are_for_operators(two: Running, keys: dict[str, str]) -> None:
    two.ask(keys["a"], model="a/one:prod")
    with two.http(keys["a"]) as http:
        assert http.get("/metrics").status_code == 403
        assert http.get("/health").json()["engine"] is None
    with two.http(keys["ops"]) as http:
        text = http.get("/metrics").text
        assert http.get("/health").json()["engine"]["name"] == "fake"
    assert 'tunefork_requests_total{model="a/one",status="ok",tenant="a"} 1.0' in text
    assert 'tunefork_prompt_tokens_total{model="a/one",tenant="a"} 25.0' in text
    assert "tunefork_engine_up 1.0" in text and "tunefork_adapter_loads_total 1.0" in text
    assert 'tunefork_time_to_first_token_seconds_count{model="a/one"} 1.0' in text
    assert 'tunefork_adapter_load_seconds_total{stage="read"} 0.5' in text


def test_large_inputs_of_one_tenant_do_not_hold_up_another(
    two: Running, keys: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the threads that render, one tenant never has all."""
    is_over, begun = Event(), []
    render = Prompts.chat

    def slow(self: Prompts, turns: Sequence[Message]) -> list[int]:
        if turns[0].content == "slow":
            begun.append(1)
            is_over.wait(20)
        return render(self, turns)

    monkeypatch.setattr(Prompts, "chat", slow)
    turns = [{"role": "user", "content": "slow"}]
    with ThreadPoolExecutor(8) as pool:
        flood = [pool.submit(two.ask, keys["a"], messages=turns) for _ in range(8)]
        eventually(lambda: sum(two.gateway._open.values()) == 8 and len(begun) >= 2)
        answered = two.ask(keys["b"], model="b/one").status_code
        is_over.set()
        assert {asked.result().status_code for asked in flood} == {200}
    assert answered == 200


def test_a_thread_that_nobody_waits_for_keeps_its_place(settings: ServeSettings) -> None:
    """Or a tenant that sends and hangs up would have them all."""

    async def run() -> None:
        gateway = Gateway(FakeEngine(), settings, lambda _: FakeEngine())
        is_over, begun = Event(), []

        def slow(number: int) -> None:
            begun.append(number)
            is_over.wait(20)

        tasks = [asyncio.create_task(gateway.read(Tenant("a"), slow, n)) for n in range(6)]
        await asyncio.sleep(0)
        for task in tasks[:4]:
            task.cancel()
        await asyncio.sleep(0.05)
        assert await asyncio.wait_for(gateway.read(Tenant("b"), max, 1, 2), 10) == 2
        assert len(begun) == 2
        is_over.set()
        await asyncio.gather(*tasks, return_exceptions=True)
        assert len(begun) == 4
        await gateway.stop()

    asyncio.run(run())


def test_one_tenant_s_bodies_leave_room_for_another(
    keys: dict[str, str], settings: ServeSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(guard, "_MOST_LARGE_PER_TENANT", 4)
    small = settings.model_copy(update={"max_body_bytes": 1000})
    padding = b" " * 900
    engine = FakeEngine()
    engine.holds = everything
    with serving(engine, small) as running, ThreadPoolExecutor(6) as pool:

        def ask(key: str, model: str) -> int:
            body = json.dumps({"model": model, "messages": ASKED, "max_tokens": 8}).encode()
            with running.http(key) as http:
                headers = {"Content-Type": "application/json"}
                content = body + padding[: 990 - len(body)]
                return http.post(
                    "/v1/chat/completions", content=content, headers=headers
                ).status_code

        flood = [pool.submit(ask, keys["a"], "tiny-base") for _ in range(6)]
        eventually(lambda: any(asked.done() for asked in flood))
        theirs = pool.submit(ask, keys["b"], "b/one")
        eventually(lambda: any(seen.tenant == "b" for seen in engine.seen))
        engine.holds = nothing
        assert theirs.result() == 200
        assert {asked.result() for asked in flood} == {200, 503}


def test_one_tenant_s_open_requests_leave_room_for_another(
    keys: dict[str, str], settings: ServeSettings
) -> None:
    few = settings.model_copy(update={"max_open_requests_per_tenant": 2})
    engine = FakeEngine()
    engine.holds = everything
    with serving(engine, few) as running, ThreadPoolExecutor(3) as pool:
        slow = [pool.submit(running.ask, keys["a"]) for _ in range(2)]
        eventually(lambda: sum(running.gateway._open.values()) == 2)
        refused = running.ask(keys["a"])
        assert refused.status_code == 429 and refused.headers["retry-after"] == "1"
        assert refused.json()["error"]["code"] == "too_many_open_requests"
        theirs = pool.submit(running.ask, keys["b"], model="b/one", max_tokens=1)
        eventually(lambda: any(seen.tenant == "b" for seen in engine.seen))
        engine.holds = nothing
        assert {asked.result().status_code for asked in (theirs, *slow)} == {200}
        assert running.ask(keys["a"], max_tokens=1).status_code == 200


def test_before_the_keys_are_read_nobody_is_an_operator(tmp_path: Path) -> None:
    door = Door(tmp_path / "serve.sqlite", may_be_open=True)
    assert not door.is_operator({})
    door.read()
    assert door.is_operator({})


def test_a_revoked_key_ends_while_the_server_runs(
    two: Running, keys: dict[str, str], settings: ServeSettings
) -> None:
    assert two.ask(keys["a"], messages=ASKED).status_code == 200
    revoke_key(settings.accounts_file, keys["a"].split("_")[1])
    eventually(lambda: two.ask(keys["a"]).status_code == 401)
    assert two.ask(keys["b"], model="b/one").status_code == 200


def test_a_server_without_keys_closes_for_good_once_there_is_one(
    server: Running, settings: ServeSettings
) -> None:
    assert server.ask().status_code == 200
    key = add_key(settings.accounts_file, Tenant("a"))
    eventually(lambda: server.ask().status_code == 401)
    assert server.ask(key).status_code == 200
    revoke_key(settings.accounts_file, key.split("_")[1])
    eventually(lambda: server.ask(key).status_code == 401)
    assert server.ask().status_code == 401
