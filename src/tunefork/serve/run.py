"""A server process: its socket, its signals, its end.

SIGTERM and Ctrl-C drain it: it listens no more, what runs goes on for `drain_timeout_s`, then
engine, holds and files are given back. A second signal cancels what runs, which is recorded; a
third one waits for no connection any more.
"""

import resource
import signal
import socket
from collections.abc import Callable
from types import FrameType

import uvicorn
from fastapi import FastAPI
from prometheus_client import disable_created_metrics

from tunefork.errors import BadInputError
from tunefork.serve.app import create_app
from tunefork.serve.engine import Engine
from tunefork.serve.gateway import Gateway
from tunefork.serve.settings import ServeSettings
from tunefork.serve.tenants import read_accounts

_BACKLOG = 2048


def serve(engine: Engine, settings: ServeSettings, say: Callable[[str], None] = print) -> None:
    """Serve until a signal comes. Raises what kept the engine from starting."""
    check_exposure(settings)
    _raise_open_files()
    # Else half of the time series would tell when the others began.
    disable_created_metrics()  # type: ignore[no-untyped-call]
    listening = bind(settings)
    app = create_app(engine, settings)
    server = uvicorn.Server(configure(app, settings))
    gateway: Gateway = app.state.gateway
    drain_on_signal(server, gateway, say)
    gateway.on_failure = lambda: setattr(server, "should_exit", True)
    gateway.on_ready = lambda: say(_welcome(gateway, listening))
    # uvicorn, once drained, raises the signal again: this one has then been heeded.
    signal.signal(signal.SIGTERM, lambda *_: None)
    server.run(sockets=[listening])
    if gateway.failure is not None:
        raise gateway.failure


def configure(app: FastAPI, settings: ServeSettings) -> uvicorn.Config:
    """How uvicorn serves `app`."""
    return uvicorn.Config(
        app,
        http="h11",  # httptools, which is preferred where it is installed, bounds no header
        log_level="warning",
        access_log=False,
        server_header=False,
        timeout_graceful_shutdown=max(1, round(settings.drain_timeout_s)),
        timeout_keep_alive=30,
    )


def _welcome(gateway: Gateway, listening: socket.socket) -> str:
    host, port = listening.getsockname()[:2]
    where = f"http://[{host}]:{port}/v1" if ":" in host else f"http://{host}:{port}/v1"
    keys = "without a key, on this machine only" if gateway.door.is_open else "keys are demanded"
    return f"serving {gateway.base.name} at {where} ({keys}); Ctrl-C ends it"


def drain_on_signal(
    server: uvicorn.Server, gateway: Gateway, say: Callable[[str], None] = print
) -> None:
    """Let the gateway know at the same moment as uvicorn; a second signal cancels what runs."""
    end = server.handle_exit
    is_cut = False

    def tell() -> None:
        if server.server_state.tasks:
            most_s = gateway.settings.drain_timeout_s
            say(f"ending: what runs has {most_s:.0f} s; a second Ctrl-C ends it at once")

    def cut() -> None:
        for task in server.server_state.tasks:
            task.cancel()

    def handle(number: int, frame: FrameType | None) -> None:
        nonlocal is_cut
        loop = gateway.loop
        if not server.should_exit or loop is None:
            gateway.drain()
            end(number, frame)
        elif is_cut:
            server.force_exit = True
        else:
            is_cut = True
        if loop is not None:  # which this may have interrupted anywhere
            loop.call_soon_threadsafe(cut if is_cut else tell)

    server.handle_exit = handle  # type: ignore[assignment,method-assign]


def check_exposure(settings: ServeSettings) -> None:
    """Raise BadInputError where others could reach a server that asks for no key."""
    if settings.is_loopback or read_accounts(settings.accounts_file).hashes:
        return
    file = f" --tenants {settings.tenants}" if settings.tenants else ""
    raise BadInputError(
        f"host: {settings.host} can be reached from other machines, and there is no key yet; make "
        f"one (tunefork serve keys add NAME{file}), or leave --host at 127.0.0.1"
    )


def bind(settings: ServeSettings) -> socket.socket:
    """The listening socket, before anything is loaded. Raises BadInputError."""
    family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
    # With the protocol said, asyncio sets TCP_NODELAY: without it, each answer waits 40 ms.
    listening = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    if hasattr(socket, "TCP_USER_TIMEOUT"):  # Linux: a client that was cut off need not read on
        timeout_ms = round(2000 * settings.stall_timeout_s)
        listening.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, timeout_ms)
    try:
        listening.bind((settings.host, settings.port))
        listening.listen(_BACKLOG)
    except OSError as error:
        listening.close()
        raise BadInputError(
            f"port: cannot listen on {settings.host}:{settings.port} ({error.strerror}); give "
            "another with --port"
        ) from error
    listening.setblocking(False)
    return listening


def _raise_open_files() -> None:
    """Each connection and each held version takes a descriptor."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
