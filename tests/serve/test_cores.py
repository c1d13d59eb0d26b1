"""Which threads of a server compute with all cores, and where they launch."""

import asyncio
from collections.abc import Iterator
from pathlib import Path
from threading import Thread, current_thread

import pytest
import torch

from tests.serve.embedded import base_folder, settings
from tunefork.errors import ModelError
from tunefork.model.device import use_device
from tunefork.serve.engines import assemble, embedded
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
        threads = engine._parts.core.tiers.loading._threads
        found.append(threads.submit(torch.get_num_threads).result())
        await engine.stop()

    asyncio.run(run())
    later = Thread(target=lambda: found.append(torch.get_num_threads()))
    later.start()
    later.join()
    assert [*found, torch.get_num_threads()] == [1, 2, 2]


def test_the_engines_thread_uses_the_device_that_was_set(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else a second GPU's tokens are waited for by an event of the first."""
    base_folder(tmp_path / "base")
    told: list[tuple[object, str]] = []

    def note(device: torch.device) -> None:
        told.append((device, current_thread().name))

    monkeypatch.setattr(assemble, "use_device", note)
    monkeypatch.setattr(embedded, "use_device", note)

    async def run() -> None:
        engine = EmbeddedEngine(settings(tmp_path / "base"))
        await engine.start()
        await engine.stop()

    asyncio.run(run())
    (loaded_on, _), engines = told
    assert loaded_on == torch.device("cpu") and engines == (loaded_on, "tunefork-engine")
    used: list[torch.device] = []
    monkeypatch.setattr(torch.cuda, "set_device", used.append)
    for device in ("cpu", "cuda", "cuda:1"):
        use_device(torch.device(device))
    assert used == [torch.device("cuda:1")]
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(ModelError, match="no such CUDA device"):
        asyncio.run(EmbeddedEngine(settings(tmp_path / "base", device="cuda:1")).start())
