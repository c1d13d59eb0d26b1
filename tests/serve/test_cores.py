"""Which threads of a server compute with all cores."""

import asyncio
from collections.abc import Iterator
from pathlib import Path
from threading import Thread, current_thread

import pytest
import torch

from tests.serve.embedded import base_folder, settings
from tunefork.serve.engines.cores import in_a_thread
from tunefork.serve.engines.embedded import EmbeddedEngine


@pytest.fixture
def two_cores() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def test_who_loads_the_base_ends() -> None:
    thread = asyncio.run(in_a_thread(current_thread))
    thread.join(5)
    assert not thread.is_alive()


def test_who_reads_adapters_computes_alone(two_cores: None, tmp_path: Path) -> None:
    base_folder(tmp_path / "base")
    found: list[int] = []

    async def run() -> None:
        engine = EmbeddedEngine(settings(tmp_path / "base"))
        await engine.start()
        assert engine._parts is not None and engine._parts.core.tiers is not None
        found.append(engine._parts.core.tiers._threads.submit(torch.get_num_threads).result())
        await engine.stop()

    asyncio.run(run())
    later = Thread(target=lambda: found.append(torch.get_num_threads()))
    later.start()
    later.join()
    assert [*found, torch.get_num_threads()] == [1, 2, 2]
