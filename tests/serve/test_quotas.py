"""Limits hold, are told with the time to wait, and the month's survives a restart."""

import asyncio
import subprocess
import sys
from contextlib import closing
from datetime import datetime
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.serve.fake_engine import FakeEngine
from tests.serve.servers import serving
from tunefork.serve import ledger as ledger_module
from tunefork.serve import quotas as quotas_module
from tunefork.serve.api.errors import ApiError
from tunefork.serve.database import connect
from tunefork.serve.ledger import Ledger, Usage, month, read_usage
from tunefork.serve.quotas import Quotas
from tunefork.serve.settings import ServeSettings
from tunefork.serve.tenants import Tenant, add_key


class Clock:
    """Seconds that pass when told to."""

    def __init__(self) -> None:
        self.now = 0.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(quotas_module, "time", clock)
    return clock


@pytest.fixture
def quotas(tmp_path: Path) -> Any:
    ledger = Ledger(tmp_path / "serve.sqlite")
    yield Quotas(ledger)
    ledger.close()


def test_requests_a_minute(quotas: Quotas, clock: Clock) -> None:
    tenant = Tenant("a", requests_per_minute=6)
    for _ in range(6):
        quotas.admit_request(tenant)
    with pytest.raises(ApiError) as refused:
        quotas.admit_request(tenant)
    assert refused.value.status == 429 and refused.value.retry_after == pytest.approx(10)
    clock.now += 10
    quotas.admit_request(tenant)
    with pytest.raises(ApiError):
        quotas.admit_request(tenant)
    quotas.admit_request(Tenant("b", requests_per_minute=6))
    quotas.admit_request(Tenant("c"))


def test_tokens_that_were_too_many_are_waited_for(quotas: Quotas, clock: Clock) -> None:
    tenant = Tenant("a", tokens_per_minute=60)
    spent = 0
    while clock.now < 3600:
        try:
            quotas.admit_tokens(tenant)
        except ApiError as refused:
            assert refused.retry_after is not None
            clock.now += refused.retry_after + 0.01
            continue
        quotas.spend(tenant, 100)
        spent += 100
    assert 3600 <= spent <= 3600 + 60 + 100


def test_the_month_is_never_passed(quotas: Quotas) -> None:
    tenant = Tenant("a", tokens_per_month=100)
    quotas.reserve(tenant, 60)
    with pytest.raises(ApiError) as refused:
        quotas.reserve(tenant, 41)
    assert refused.value.code == "insufficient_quota"
    quotas.reserve(tenant, 40)
    quotas.release(tenant, 60)
    assert quotas.left_this_month(tenant) == 60


def test_a_minute_s_limits_are_told_as_the_api_tells_them(quotas: Quotas, clock: Clock) -> None:
    tenant = Tenant("a", requests_per_minute=6, tokens_per_minute=600)
    quotas.admit_request(tenant)
    quotas.spend(tenant, 640)
    assert quotas.headers(tenant) == {
        "x-ratelimit-limit-requests": "6",
        "x-ratelimit-remaining-requests": "5",
        "x-ratelimit-reset-requests": "10s",
        "x-ratelimit-limit-tokens": "600",
        "x-ratelimit-remaining-tokens": "0",
        "x-ratelimit-reset-tokens": "1m4s",
    }
    clock.now += 63.95
    assert quotas.headers(tenant)["x-ratelimit-reset-tokens"] == "50ms"
    assert quotas.headers(Tenant("b")) == {}


def test_the_next_month_begins_when_it_begins(monkeypatch: pytest.MonkeyPatch) -> None:
    class Now(datetime):
        @classmethod
        def now(cls, tz: Any = None) -> "Now":
            return cls(2028, 2, 28, 23, 59, 30, tzinfo=tz)

    monkeypatch.setattr(quotas_module, "datetime", Now)
    assert quotas_module._until_next_month_s() == 86_430


def test_a_clock_that_was_not_set_yet_forgets_no_month(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "serve.sqlite"
    with closing(connect(file)) as database:
        database.execute("INSERT INTO months VALUES ('a', ?, 70)", (month(),))
    with monkeypatch.context() as patch:
        patch.setattr(ledger_module, "month", lambda: "1970-01")
        ledger = Ledger(file)
    assert Quotas(ledger).left_this_month(Tenant("a", tokens_per_month=100)) == 30
    ledger.close()


@pytest.mark.parametrize("is_removed", [False, True])
def test_a_file_that_takes_the_others_place_gets_what_is_used_from_then_on(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, is_removed: bool
) -> None:
    file = tmp_path / "serve.sqlite"
    ledger = Ledger(file)

    def record(id: str) -> None:
        now = f"{month()}-26T00:00:00"
        asked = Usage(id, now, "a", None, "completions", "m", None, "ok", 1, 2, 3, None, 0.5)
        asyncio.run(ledger.record(asked))

    record("1")
    for left in tmp_path.glob("serve.sqlite*"):
        left.rename(tmp_path / f"before-{left.name}")
    if not is_removed:
        connect(file).close()
    record("2")
    record("3")
    assert ledger.used_this_month("a") == 10  # that of the new file, now the higher one
    ledger.close()
    assert [row.requests for row in read_usage(file)] == [2]
    assert sum("was replaced or removed" in r.getMessage() for r in caplog.records) == 1


def test_servers_with_one_file_share_a_month(tmp_path: Path) -> None:
    file = tmp_path / "serve.sqlite"
    ledgers = [Ledger(file), Ledger(file)]
    told = (
        f"{month()}-26T00:00:00",
        "a",
        None,
        "completions",
        "m",
        None,
        "ok",
        1,
        40,
        30,
        0.1,
        0.2,
    )
    asyncio.run(ledgers[0].record(Usage("r", *told)))
    ledgers[1].refresh()
    assert Quotas(ledgers[1]).left_this_month(Tenant("a", tokens_per_month=100)) == 30
    for ledger in ledgers:
        ledger.close()


def _ask(running: Any, key: str, **fields: Any) -> httpx.Response:
    answer: httpx.Response = running.ask(key, **fields)
    return answer


def test_quotas_hold_over_http_and_over_a_restart(settings: ServeSettings) -> None:
    key = add_key(settings.accounts_file, Tenant("a", tokens_per_month=100))
    with serving(FakeEngine(), settings) as running:
        assert _ask(running, key).json()["usage"]["total_tokens"] == 45
        refused = _ask(running, key, max_tokens=40)
        assert refused.status_code == 429
        assert refused.json()["error"]["code"] == "insufficient_quota"
        assert int(refused.headers["retry-after"]) > 0
        told = 'tunefork_refused_total{reason="month",tenant="a"} 1.0'
        assert told in running.gateway.parts.metrics.text().decode()
    with serving(FakeEngine(), settings) as running:
        cut = _ask(running, key, ignore_eos=True)  # nobody said how long: what the month has left
        assert cut.json()["usage"]["total_tokens"] == 55
        assert _ask(running, key, max_tokens=1).status_code == 429
    assert (
        sum(row.prompt_tokens + row.completion_tokens for row in read_usage(settings.accounts_file))
        == 100
    )


def test_rates_hold_over_http(settings: ServeSettings) -> None:
    slow = add_key(settings.accounts_file, Tenant("a", requests_per_minute=2))
    small = add_key(settings.accounts_file, Tenant("b", tokens_per_minute=30))
    with serving(FakeEngine(), settings) as running:
        answers = [_ask(running, slow) for _ in range(3)]
        assert [answer.status_code for answer in answers] == [200, 200, 429]
        left = [answer.headers["x-ratelimit-remaining-requests"] for answer in answers]
        assert left == ["1", "0", "0"] and "x-ratelimit-limit-tokens" not in answers[0].headers
        streamed = _ask(running, small, stream=True, ignore_eos=True, max_tokens=1)
        assert streamed.headers["x-ratelimit-remaining-tokens"] == "4"  # of 30 less 25 less 1
        assert [_ask(running, small).status_code for _ in range(2)] == [200, 429]
        refused = _ask(running, small)
        assert refused.json()["error"]["type"] == "tokens"
        assert 0 < int(refused.headers["retry-after"]) <= 90
        assert refused.headers["x-ratelimit-remaining-tokens"] == "0"


def test_what_was_told_complete_survives_a_kill(tmp_path: Path) -> None:
    file = tmp_path / "serve.sqlite"
    code = f"""
import asyncio, os
from pathlib import Path
from tunefork.serve.ledger import Ledger, Usage
async def main():
    ledger = Ledger(Path({str(file)!r}))
    async def one(i):
        await ledger.record(Usage(f"r{{i}}", "{month()}-26T00:00:00", "a", None, "chat.completions",
                                  "m", None, "ok", 1, 2, 3, 0.1, 0.2))
        os.write(1, b"x")
    tasks = [asyncio.create_task(one(i)) for i in range(200)]
    await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    os.kill(os.getpid(), 9)
asyncio.run(main())
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, check=False)
    assert done.returncode == -9, done.stderr
    (row,) = read_usage(file)
    assert row.requests >= len(done.stdout) > 0
    ledger = Ledger(file)
    assert ledger.used_this_month("a") == 5 * row.requests
    ledger.close()
