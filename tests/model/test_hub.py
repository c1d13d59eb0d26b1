"""Without a network an unknown name is an error at once; with a hub that listens it is asked."""

import socket
import threading
from collections.abc import Iterator
from typing import Any

import pytest

from tunefork.errors import ModelError
from tunefork.model import hub
from tunefork.model.load import load_config
from tunefork.recipe import ModelSection


@pytest.fixture(autouse=True)
def forget(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No proxy, nothing found out before, and the hub may be asked."""
    for name in ("http_proxy", "https_proxy", "all_proxy", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    hub._is_reachable.cache_clear()
    yield
    hub._is_reachable.cache_clear()


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def test_an_unknown_name_is_an_error_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody listens, which is found out once: nothing is tried again, nor waited for."""
    tried: list[object] = []
    connect = socket.socket.connect

    def counted(self: socket.socket, address: Any) -> None:
        tried.append(address)
        connect(self, address)

    monkeypatch.setattr(socket.socket, "connect", counted)
    port = _free_port()
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", f"http://127.0.0.1:{port}")
    with pytest.raises(ModelError, match="smollm2-135m-instuct cannot be loaded; did you mean"):
        load_config(ModelSection(id="smollm2-135m-instuct"))
    with pytest.raises(ModelError, match="needs the network, or its files in the cache"):
        load_config(ModelSection(id="nobody/at-all"))
    # ours, and what huggingface_hub 1.x asks once for its own sake; each file would be five more
    assert len(tried) in (1, 2)


def test_a_hub_that_never_answers_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    is_over, has_answered = threading.Event(), threading.Event()

    def never(*_: object, **__: object) -> None:
        is_over.wait(60)
        has_answered.set()
        raise OSError

    monkeypatch.setattr(hub, "PATIENCE_S", 0.05)
    monkeypatch.setattr(socket, "create_connection", never)
    assert not hub.can_ask_hub()
    assert not has_answered.is_set()
    is_over.set()


def test_a_hub_or_proxy_that_listens_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        here = f"127.0.0.1:{listener.getsockname()[1]}"
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", f"http://{here}")
        assert hub.can_ask_hub()
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "https://hub.invalid")
        assert not hub.can_ask_hub()
        hub._is_reachable.cache_clear()
        monkeypatch.setenv("https_proxy", here)
        assert hub.can_ask_hub()
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert not hub.can_ask_hub()
