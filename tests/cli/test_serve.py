"""`tunefork serve` and its keys and usage, on the command line."""

import asyncio
import json
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from tunefork.cli.app import app
from tunefork.errors import BadInputError
from tunefork.serve.ledger import Ledger, Usage
from tunefork.serve.tenants import Tenant, read_accounts


def _run(*arguments: str) -> str:
    result = CliRunner().invoke(app, ["serve", *arguments], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output.strip()


def test_a_key_is_made_listed_and_ended(home: Path) -> None:
    key = _run("keys", "add", "acme", "--models", "acme/*", "--tokens-per-month", "1000")
    found = read_accounts(home / "serve.sqlite").find(key)
    assert found and found[0] == Tenant("acme", ("acme/*",), tokens_per_month=1000)
    listed = _run("keys", "list")
    assert "acme: acme/* (1,000 tokens a month)" in listed and found[1] in listed
    assert key not in listed
    assert "revoked" in _run("keys", "revoke", found[1])
    assert read_accounts(home / "serve.sqlite").find(key) is None
    told = json.loads(_run("keys", "list", "--json"))
    assert told["keys"][0]["revoked"] and "sha256" not in json.dumps(told)


def test_another_key_leaves_what_is_not_given(home: Path) -> None:
    _run("keys", "add", "acme", "--models", "acme/*", "--tokens-per-minute", "10", "--no-base")
    key = json.loads(
        _run("keys", "add", "acme", "--weight", "2", "--tokens-per-minute", "0", "--json")
    )["key"]
    found = read_accounts(home / "serve.sqlite").find(key)
    assert found and found[0] == Tenant("acme", ("acme/*",), has_base=False, weight=2.0)
    assert "acme: acme/* (weight 2, not the base)" in _run("keys", "list")


def test_an_empty_pattern_is_refused(home: Path) -> None:
    with pytest.raises(BadInputError, match="--models: a pattern is empty"):
        _run("keys", "add", "acme", "--models", "")
    assert not (home / "serve.sqlite").exists()


def test_usage_is_summed_by_tenant_and_version(home: Path) -> None:
    ledger = Ledger(home / "serve.sqlite")

    async def fill() -> None:
        for number, (tenant, ended) in enumerate(
            (("a", "2026-10-01"), ("a", "2026-11-02"), ("a", "2026-11-03"), ("b", "2026-11-03"))
        ):
            usage = Usage(
                id=f"r{number}",
                ended=f"{ended}T00:00:00",
                tenant=tenant,
                key_id=None,
                endpoint="completions",
                model="x:v1",
                end_user=None,
                status="ok",
                choices=1,
                prompt_tokens=10,
                completion_tokens=5,
                first_token_s=0.1,
                total_s=0.2,
            )
            await ledger.record(usage)

    asyncio.run(fill())
    ledger.close()
    for no_date in ("Nov", "2026-13", "2026-02-30", "2026-1"):
        with pytest.raises(BadInputError, match=f"--since: '{no_date}' is no date; write 2026, "):
            _run("usage", "--since", no_date)
    assert _run("usage", "--since", "2026") == _run("usage", "--since", "2026-10-01")
    assert _run("usage", "--tenant", "a", "--since", "2026-11") == (
        "a  x:v1  2 requests  20 + 10 tokens"
    )
    assert _run("usage", "--tenant", "b") == "b  x:v1  1 request  10 + 5 tokens"
    assert [row["requests"] for row in json.loads(_run("usage", "--json"))] == [3, 1]


def test_nothing_yet_is_no_error(home: Path) -> None:
    assert _run("usage") == "" and _run("keys", "list") == ""
    assert not (home / "serve.sqlite").exists()


def test_a_base_is_asked_for() -> None:
    with pytest.raises(BadInputError, match="--base"):
        CliRunner().invoke(app, ["serve"], catch_exceptions=False)


def test_a_missing_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    from tunefork.cli import serve as module

    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "uvicorn" else 1)
    with pytest.raises(BadInputError, match=r"uvicorn.*pip install 'tunefork\[serve\]'"):
        module._check_extra()
    with pytest.raises(BadInputError, match=r"pip install 'tunefork\[serve\]'"):
        CliRunner().invoke(app, ["serve", "--base", "owner/name"], catch_exceptions=False)
