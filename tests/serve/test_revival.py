"""When an engine that died is started again, and what the log says of it."""

import asyncio
import logging

import pytest

from tests.serve.fake_engine import FakeEngine
from tunefork.errors import ModelError
from tunefork.serve import revival
from tunefork.serve.engine import EngineState
from tunefork.serve.revival import Revival


class Sickly(FakeEngine):
    """Starts, and dies at once."""

    is_up = False

    async def start(self) -> None:
        self.is_up = True
        await super().start()

    async def stop(self) -> None:
        self.is_up = False
        await super().stop()

    def state(self) -> EngineState:
        return EngineState(healthy=False, why=f"life {self.starts} was short")


def test_one_that_dies_at_once_is_started_ever_more_seldom(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    engine, now, waits = Sickly(), 1000.0, list[float]()

    async def sleep(seconds: float) -> None:
        nonlocal now
        assert not engine.is_up  # or it would wait with all its memory
        waits.append(seconds)
        now += seconds
        engine.start_fails = ModelError("no such file") if len(waits) in range(5, 9) else None

    monkeypatch.setattr(revival, "_FIRST_S", 1.0)
    monkeypatch.setattr("tunefork.serve.revival.time.monotonic", lambda: now)
    monkeypatch.setattr("tunefork.serve.revival.asyncio.sleep", sleep)

    async def run() -> None:
        nonlocal now
        one = Revival(engine, "the engine")

        async def die() -> None:
            one.look()
            assert one.is_at_work and one._task is not None
            await one._task

        for _ in range(6):  # the fifth of which takes five starts
            await die()
        assert waits == [0.0, 1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 60.0, 60.0, 60.0]
        assert one.failures == 10
        now += 61.0
        await die()
        assert (waits[-1], one.failures) == (0.0, 1)

    with caplog.at_level(logging.ERROR):
        asyncio.run(run())
    said = [record.getMessage() for record in caplog.records]
    assert said[1] == ("the engine died: life 1 was short; it is started again in 1 s, try 2")
    assert said[5].startswith("the engine cannot be started: no such file; ")
