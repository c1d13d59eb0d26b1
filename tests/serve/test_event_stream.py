"""Events over loopback, from a server that sends bytes as it is told to."""

import asyncio
from collections.abc import Awaitable, Callable

import pytest

from tunefork.serve.event_stream import Address, StreamBrokenError, post

HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n"


def exchange(sent: list[bytes], *, pause_s: float = 0.0) -> list[bytes]:
    """The events that come of the bytes `sent`."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n{}")
        try:
            for part in sent:
                writer.write(part)
                await asyncio.sleep(pause_s)
        finally:
            writer.close()

    async def ask(address: Address) -> list[bytes]:
        async with post(address, "/x", b"{}", {"A": "b"}) as answer:
            return [event async for event in answer.events()]

    return asyncio.run(_between(serve, ask))


async def _between(
    serve: Callable[..., Awaitable[None]], ask: Callable[[Address], Awaitable[list[bytes]]]
) -> list[bytes]:
    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    async with server:
        return await ask(Address("127.0.0.1", server.sockets[0].getsockname()[1]))


def chunk(data: bytes) -> bytes:
    return f"{len(data):x}\r\n".encode() + data + b"\r\n"


@pytest.mark.parametrize(
    "parts",
    [
        [HEAD + b"\r\n", b"data: one\n\ndata:two\n\n"],
        [HEAD + b"Content-Length: 22\r\n\r\n", b"data: one\n\n", b"data:two\n\n\n"],
        [HEAD + b"Transfer-Encoding: chunked\r\n\r\n", chunk(b"data: one\n\ndata:"),
         chunk(b"two\n\n")[:4], chunk(b"two\n\n")[4:], chunk(b": ping\n\n"), chunk(b"")],
        [HEAD + b"Transfer-Encoding: Chunked\r\n\r\n" + chunk(b"data: one\r\n\r\ndata: two\r\n\r\n")
         + chunk(b"")],
    ],
)  # fmt: skip
def test_events_are_read_however_they_are_cut(parts: list[bytes]) -> None:
    assert exchange(parts, pause_s=0.005) == [b"one", b"two"]


@pytest.mark.parametrize(
    ("parts", "said"),
    [
        ([b""], "gave no answer"),
        ([b"SSH-2.0-OpenSSH\r\n\r\n"], "no HTTP"),
        ([HEAD + b"Transfer-Encoding: chunked\r\n\r\n" + chunk(b"data: one\n\n")], "ended early"),
        ([HEAD + b"Transfer-Encoding: chunked\r\n\r\nzz\r\n"], "no HTTP"),
        ([HEAD + b"Content-Length: 50\r\n\r\ndata: one\n\n"], "ended early"),
    ],
)
def test_what_is_not_whole_is_an_error(parts: list[bytes], said: str) -> None:
    with pytest.raises(StreamBrokenError, match=said):
        exchange(parts)


def test_leaving_drops_the_connection_at_once() -> None:
    async def main() -> bool:
        dropped = asyncio.Event()

        async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            await reader.readuntil(b"\r\n\r\n{}")
            writer.write(HEAD + b"\r\ndata: 1\n\n")
            await reader.read()
            dropped.set()
            writer.close()

        server = await asyncio.start_server(serve, "127.0.0.1", 0)
        async with server:
            address = Address("127.0.0.1", server.sockets[0].getsockname()[1])
            async with post(address, "/", b"{}", {}) as answer:
                assert await anext(answer.events()) == b"1"
            async with asyncio.timeout(60):
                return await dropped.wait()

    assert asyncio.run(main())


def test_nobody_at_the_address_is_an_error() -> None:
    async def ask() -> None:
        async with post(Address("127.0.0.1", 1), "/", b"{}", {}):
            pass

    with pytest.raises(StreamBrokenError, match="does not answer"):
        asyncio.run(ask())


def test_addresses() -> None:
    assert str(Address.parse("https://a.example/v1/")) == "https://a.example:443/v1"
    assert Address.parse("http://[::1]:8000") == Address("::1", 8000)
    for wrong in ("localhost:8000", "ftp://x", "http://", "http://x:nine"):
        with pytest.raises(ValueError):
            Address.parse(wrong)
