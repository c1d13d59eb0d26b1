"""A real uvicorn server on a loopback port, in a thread of its own."""

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx
import uvicorn

from tests.folders import save_model
from tests.registry.artefacts import LAYER
from tests.serve.fake_engine import FakeEngine
from tunefork.model.fingerprint import identify
from tunefork.recipe import ModelSection
from tunefork.registry.provenance import Provenance, write_provenance
from tunefork.registry.store import Store
from tunefork.registry.version import Version
from tunefork.serve.app import create_app
from tunefork.serve.engine import Engine
from tunefork.serve.gateway import Gateway
from tunefork.serve.run import bind, drain_on_signal
from tunefork.serve.settings import ServeSettings

__all__ = ["LAYER", "Running", "publish", "save_base", "serving"]


@dataclass(frozen=True)
class Running:
    """A server that answers."""

    url: str
    gateway: Gateway
    server: uvicorn.Server

    def http(self) -> httpx.Client:
        return httpx.Client(base_url=self.url, timeout=20)


@contextmanager
def serving(engine: Engine, settings: ServeSettings, *, wait: bool = True) -> Iterator[Running]:
    """A server over `engine` on any free port; it is ready unless told not to wait."""
    settings = settings.model_copy(update={"port": 0})
    listening = bind(settings)
    app = create_app(engine, settings)
    config = uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=5)
    server = uvicorn.Server(config)
    drain_on_signal(server, app.state.gateway)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]}, daemon=True)
    thread.start()
    running = Running(f"http://127.0.0.1:{listening.getsockname()[1]}", app.state.gateway, server)
    try:
        while not server.started or (wait and running.gateway.state == "starting"):
            assert thread.is_alive(), running.gateway.failure
            time.sleep(0.005)
        yield running
    finally:
        server.should_exit = True
        thread.join(10)
        assert not thread.is_alive()


def save_base(folder: Path) -> Path:
    """A tiny llama."""
    save_model(folder)
    return folder


def publish(base: Path, folder: Path, name: str, **options: object) -> Version:
    """An adapter over `base`, trained by nobody, as the next version of `name`."""
    import torch
    from transformers import AutoModelForCausalLM

    from tests.registry.conftest import trained
    from tunefork.recipe import LoraSection, Method
    from tunefork.registry.peft_format import save_adapter

    model = trained(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), Method.LORA)
    save_adapter(model, folder, LoraSection(rank=4), base=str(base))
    identity = identify(ModelSection(id=str(base)))
    write_provenance(folder, Provenance(identity=identity, recipe={"data": {"train": "x.jsonl"}}))
    with Store.open() as store:
        return store.publish(folder, name, tags=options.get("tags", ()))  # type: ignore[arg-type]
