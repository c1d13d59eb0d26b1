"""Answers that match a grammar (extra `grammar`), beside others that need not."""

import asyncio
import json
import re
from pathlib import Path
from typing import Any

import pytest

from tests.serve.embedded import answers, base_folder, request, started
from tunefork.errors import BadInputError
from tunefork.serve.engine import Grammar
from tunefork.serve.engines import grammar

PROMPT = [20, 60, 100, 140, 180, 220]
SCHEMA = {
    "type": "object",
    "properties": {"team": {"enum": ["compute", "storage"]}, "urgent": {"type": "boolean"}},
    "required": ["team", "urgent"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("grammar") / "base"
    base_folder(folder)
    return folder


def test_answers_match_their_own_grammar(base: Path) -> None:
    pytest.importorskip("llguidance")

    def ask(name: str, kind: Any, value: str = "", **options: Any) -> Any:
        return request(name, PROMPT, max_tokens=240, grammar=Grammar(kind, value), **options)

    async def run() -> None:
        async with started(base) as engine:
            assert engine.capabilities.grammars == grammar.KINDS
            schema, expression, drawn, free = await answers(
                engine,
                [
                    ask("a", "json_schema", json.dumps(SCHEMA)),
                    ask("b", "regex", "(yes|no), [0-9]{3}"),
                    ask("c", "json_schema", json.dumps(SCHEMA), temperature=1.5, seed=3),
                    request("d", PROMPT, max_tokens=12),
                ],
            )
            for piece in (schema, drawn):
                found = json.loads(piece.text)
                assert set(found) == {"team", "urgent"} and found["team"] in ("compute", "storage")
            assert re.fullmatch("(yes|no), [0-9]{3}", expression.text)
            assert {schema.finish_reason, expression.finish_reason} == {"stop"}
            assert free.finish_reason == "length"
            for kind, value in (("json_schema", "{"), ("regex", "("), ("json_schema", "[1]")):
                with pytest.raises(BadInputError, match=kind):
                    await answers(engine, [ask("e", kind, value)])

    asyncio.run(run())


def test_without_the_extra_there_are_none(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("assemble", "embedded"):
        monkeypatch.setattr(f"tunefork.serve.engines.{module}.is_available", lambda: False)

    async def run() -> None:
        async with started(base) as engine:
            assert engine.capabilities.grammars == frozenset()
            with pytest.raises(BadInputError, match="tunefork\\[grammar\\]"):
                await answers(engine, [request("a", PROMPT, grammar=Grammar("json_object"))])

    asyncio.run(run())
