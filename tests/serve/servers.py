"""A real uvicorn server on a loopback port, in a thread of its own."""

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import httpx
import uvicorn

from tunefork.serve.app import create_app
from tunefork.serve.engine import Engine, ServedAdapter
from tunefork.serve.gateway import Gateway
from tunefork.serve.run import bind, configure, drain_on_signal
from tunefork.serve.settings import ServeSettings

ASKED = [{"role": "user", "content": "hello dog"}]
"""25 tokens by the tests' tokenizer and template."""


@dataclass(frozen=True)
class Running:
    """A server that answers."""

    url: str
    gateway: Gateway
    server: uvicorn.Server
    thread: int
    """Of the event loop, as the system numbers it."""

    @property
    def port(self) -> int:
        return int(self.url.rpartition(":")[2])

    def http(self, key: str | None = None) -> httpx.Client:
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        # Certificates, which take longer to read than most tests, are not needed.
        return httpx.Client(base_url=self.url, timeout=60, headers=headers, verify=False)

    def ask(self, key: str | None = None, **fields: Any) -> httpx.Response:
        """One chat completion."""
        body = {"model": "tiny-base", "messages": ASKED, "temperature": 0} | fields
        with self.http(key) as http:
            return http.post("/v1/chat/completions", json=body)


@contextmanager
def serving(
    engine: Engine,
    settings: ServeSettings,
    *,
    wait: bool = True,
    replicate: Callable[[ServedAdapter], Engine] | None = None,
) -> Iterator[Running]:
    """A server over `engine` on any free port; it is ready unless told not to wait."""
    settings = settings.model_copy(update={"port": 0})
    listening = bind(settings)
    app = create_app(engine, settings, replicate)
    server = uvicorn.Server(configure(app, settings.model_copy(update={"drain_timeout_s": 5.0})))
    drain_on_signal(server, app.state.gateway)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]}, daemon=True)
    thread.start()
    url = f"http://127.0.0.1:{listening.getsockname()[1]}"
    assert thread.native_id is not None
    running = Running(url, app.state.gateway, server, thread.native_id)
    try:
        eventually(lambda: server.started)
        eventually(lambda: not wait or running.gateway.state != "starting")
        yield running
    finally:
        server.should_exit = True
        thread.join(60)
        assert not thread.is_alive()


def eventually(is_so: Callable[[], Any], *, within_s: float = 60.0) -> None:
    """Wait until `is_so()`, on however busy a machine."""
    until = time.monotonic() + within_s
    while not is_so():
        assert time.monotonic() < until, "it never came"
        time.sleep(0.005)
